"use strict";
const NAMES = ["PS1", "PS2", "FH1"];
// of a row of the table: points, angle, doubt
const TAIL = /,"\(([^"]*)\)","\(([^"]*)\)","\(([^"]*)\)",[\d.]+,((?:"(?:[^"]|"")*")?[^,"]*)$/;
const COLUMNS = ["Filename", ...NAMES, "Corrected"];
const POINT = /^\((-?[\d.]+), ?(-?[\d.]+)\)$/;
const MOST = 10;  // refused lines that are named
const ARROWS = {ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1]};
const CORNERS = ["top left", "top right", "bottom left", "bottom right"];
const $ = (id) => document.getElementById(id);
const list = $("cases"), editor = $("editor"), stage = $("stage"), loupe = $("loupe");
const storageKey = "aop-report " + list.dataset.digest;
const cases = [...list.children].map(read), handles = NAMES.map(handle);
let open = null, active = 2, grabbed = null, unkept = false;

function read(card) {
  const one = {card, ...JSON.parse(card.dataset.case)};
  one.model = TAIL.exec(one.row).slice(1, 4).map((cell) => cell.split(", ").map(Number));
  one.points = one.model;
  const finest = Math.min(...one.pixel);
  one.scale = one.pixel.map((size) => size / finest);  // of an image px in the picture's units
  one.view = [one.size[0] * one.scale[0], one.size[1] * one.scale[1]];
  one.long = Math.max(...one.view);
  one.svg = card.querySelector("svg");
  if (one.svg) {
    one.svg.setAttribute("viewBox", `0 0 ${one.view[0]} ${one.view[1]}`);
    draw(one, one.svg, 0.018 * one.long);
    card.querySelector("button").onclick = () => show(one);
  }
  return one;
}

// The unsigned angle PS2-PS1-FH1 in degrees, of px of a size; NaN where two points coincide.
function angleOf(points, pixel) {
  const [u, v] = [1, 2].map((k) => [0, 1].map((i) => (points[k][i] - points[0][i]) * pixel[i]));
  const cosine = (u[0] * v[0] + u[1] * v[1]) / (Math.hypot(...u) * Math.hypot(...v));
  return Math.acos(Math.min(1, Math.max(-1, cosine))) * 180 / Math.PI;
}

// Integer coordinates are pixel centres.
function toView(one, point) { return point.map((value, i) => (value + 0.5) * one.scale[i]); }
function toImage(one, event) {
  const at = new DOMPoint(event.clientX, event.clientY);
  const {x, y} = at.matrixTransform(stage.getScreenCTM().inverse());
  return [x / one.scale[0] - 0.5, y / one.scale[1] - 0.5];
}

function svg(parent, name, attributes) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  return parent.appendChild(element);
}

// The lines, the tangent on past FH1, and the arc on the short way from PS2 to FH1.
function outline(one) {
  const [p, q, r] = one.points.map((point) => toView(one, point));
  const u = [q[0] - p[0], q[1] - p[1]], v = [r[0] - p[0], r[1] - p[1]];
  const lengths = [Math.hypot(...u), Math.hypot(...v)];
  const radius = Math.min(0.4 * Math.min(...lengths), 0.09 * one.long);
  const from = p.map((value, i) => value + u[i] * radius / lengths[0]);
  const to = p.map((value, i) => value + v[i] * radius / lengths[1]);
  const end = p.map((value, i) => value + v[i] * 1.25);
  const turn = u[0] * v[1] - u[1] * v[0] > 0 ? 1 : 0;
  return `M${q} L${p} L${end} M${from} A${radius} ${radius} 0 0 ${turn} ${to}`;
}

function draw(one, parent, radius) {
  const [halo, line] = ["halo", "line"].map(
    (name) => parent.querySelector("." + name) || svg(parent, "path", {class: name}));
  for (const path of [halo, line]) path.setAttribute("d", outline(one));
  NAMES.forEach((name, k) => {
    const ring = parent.querySelector("circle." + name) || svg(parent, "circle", {class: name});
    const [x, y] = toView(one, one.points[k]);
    for (const [key, value] of [["cx", x], ["cy", y], ["r", radius]])
      ring.setAttribute(key, value);
  });
}

function handle(name, k) {
  const group = svg(stage, "g", {tabindex: 0, role: "slider", "aria-label": name, class: name,
    "aria-valuemin": 0, "aria-valuemax": 180, fill: "currentColor"});
  svg(group, "circle", {class: name});
  svg(group, "text", {}).textContent = name;
  group.onfocus = () => { active = k; magnify(); };
  group.onkeydown = (event) => {
    const way = ARROWS[event.key];
    if (!way) return;
    event.preventDefault();
    move(k, open.points[k].map((value, i) => value + way[i] * (event.shiftKey ? 10 : 1)));
  };
  return group;
}

function corrected(one) { return one.points !== one.model; }

// Give a case other points; the model's own are no correction.
function set(one, points) {
  one.points = String(points) === String(one.model) ? one.model : points;
  const words = corrected(one) ? "corrected" : "";
  one.card.classList.toggle("corrected", corrected(one));
  one.card.querySelector(".mark").textContent = words;
  one.card.querySelector(".angle").textContent = degrees(one.points, one);
  one.card.querySelector(".was").textContent =
    corrected(one) ? `The model said ${degrees(one.model, one)}.` : "";
  if (one.svg) draw(one, one.svg, 0.018 * one.long);
  const count = cases.filter(corrected).length;
  $("count").textContent = count;
  $("save").disabled = !count;
}

function degrees(points, one) { return angleOf(points, one.pixel).toFixed(1) + "°"; }

function move(k, point) {
  const inside = point.map((value, i) => Math.min(Math.max(value, -0.5), open.size[i] - 0.5));
  const points = open.points.map((old, j) => j === k ? inside.map((v) => +v.toFixed(4)) : old);
  if (Number.isNaN(angleOf(points, open.pixel))) return;  // two coincide: there is no angle
  set(open, points);
  keep();
  refresh();
}

// Corrections outlive a closed tab; only numbers are kept, under the digest of the table.
function keep() {
  const kept = cases.filter(corrected).map((one) => [one.at, one.points]);
  try {
    localStorage.setItem(storageKey, JSON.stringify(kept));
  } catch (error) {
    unkept = true;
    $("notice").textContent = `Save before you leave: this browser keeps nothing (${error.name}).`;
  }
}

function restore() {
  try {
    const kept = JSON.parse(localStorage.getItem(storageKey)) || [];
    const known = new Map(cases.map((one) => [one.at, one]));
    for (const [at, points] of kept)
      if (known.has(at) && !Number.isNaN(angleOf(points, [1, 1]))) set(known.get(at), points);
    if (kept.length) $("notice").textContent = "Corrections made here earlier are shown again.";
  } catch (error) {
    $("notice").textContent = `Earlier corrections cannot be read (${error.name}).`;
  }
}

function show(one) {
  open = one;
  grabbed = null;
  const view = `0 0 ${one.view[0]} ${one.view[1]}`, drawing = $("drawing");
  stage.setAttribute("viewBox", view);
  drawing.replaceChildren();
  svg(drawing, "image", {href: one.card.querySelector("img").src, width: one.view[0],
    height: one.view[1], preserveAspectRatio: "none"});
  $("name").textContent = one.card.querySelector("bdi").textContent;
  const seen = cases.filter((other) => other.svg && !other.card.hidden), at = seen.indexOf(one);
  $("place").textContent = `${at + 1} of ${seen.length} shown`;
  for (const [id, other] of [["previous", seen[at - 1]], ["next", seen[at + 1]]]) {
    $(id).disabled = !other;
    $(id).onclick = () => show(other);
  }
  const isNew = !editor.open, on = document.activeElement;
  if (isNew) editor.showModal();
  if (isNew || on.disabled) $($("next").disabled ? "close" : "next").focus();
  refresh();
}

function refresh() {
  const unit = 1 / stage.getScreenCTM().a;  // of a px of the screen in the picture's
  draw(open, $("drawing"), 9 * unit);
  handles.forEach((group, k) => {
    const [x, y] = toView(open, open.points[k]);
    const ring = group.querySelector("circle"), text = group.querySelector("text");
    for (const [key, value] of [["cx", x], ["cy", y], ["r", 9 * unit]])
      ring.setAttribute(key, value);
    const left = NAMES[k] === "PS2";
    text.setAttribute("transform",
      `translate(${x + (left ? -13 : 13) * unit} ${y - 10 * unit}) scale(${16 * unit})`);
    text.setAttribute("text-anchor", left ? "end" : "start");
    const said = open.points[k].map((value) => value.toFixed(1)).join(", ");
    group.setAttribute("aria-valuenow", angleOf(open.points, open.pixel).toFixed(1));
    group.setAttribute("aria-valuetext", `${said} px, angle ${degrees(open.points, open)}`);
    $("at-" + NAMES[k]).textContent = said + " px";
  });
  $("angle").textContent = degrees(open.points, open);
  $("mark").textContent = corrected(open) ? "corrected" : "";
  $("said").replaceChildren(
    ...[...open.card.querySelectorAll(".told")].map((element) => element.cloneNode(true)));
  $("reset").disabled = !corrected(open);
  magnify();
}

function magnify() {
  const [x, y] = toView(open, open.points[active]), half = open.long / 16;
  loupe.setAttribute("viewBox", `${x - half} ${y - half} ${2 * half} ${2 * half}`);
  loupe.querySelector(".cross").setAttribute("d",
    `M${x - half / 6} ${y}h${half / 3} M${x} ${y - half / 6}v${half / 3}`);
  loupe.setAttribute("class", CORNERS[corner()]);
}

// The corner that is the furthest from all landmarks.
function corner() {
  const points = open.points.map((point) => toView(open, point));
  const free = [[0, 0], [1, 0], [0, 1], [1, 1]].map(([i, j]) => Math.min(...points.map(
    ([x, y]) => Math.hypot(x - i * open.view[0], y - j * open.view[1]))));
  return free.indexOf(Math.max(...free));
}

stage.onpointerdown = (event) => {
  const matrix = stage.getScreenCTM();
  const far = open.points.map((point) => {
    const at = new DOMPoint(...toView(open, point)).matrixTransform(matrix);
    return Math.hypot(at.x - event.clientX, at.y - event.clientY);
  });
  const k = far.indexOf(Math.min(...far));
  if (far[k] > 36) return;
  event.preventDefault();
  const at = toImage(open, event);
  grabbed = {k, shift: open.points[k].map((value, i) => value - at[i])};  // it does not jump
  stage.setPointerCapture(event.pointerId);
  handles[k].focus();
};
stage.onpointermove = (event) => {
  if (grabbed) move(grabbed.k, toImage(open, event).map((value, i) => value + grabbed.shift[i]));
};
stage.onpointerup = stage.onpointercancel = () => { grabbed = null; };
editor.onkeydown = (event) => {
  const button = {PageDown: $("next"), PageUp: $("previous")}[event.key];
  if (!button) return;
  event.preventDefault();
  button.click();
};
$("reset").onclick = () => { set(open, open.model); keep(); refresh(); };
$("close").onclick = () => editor.close();
editor.onclose = () => open.card.querySelector("button").focus();

function filter() {
  const words = $("filter").value.toLowerCase().split(/\s+/).filter(Boolean);
  for (const item of document.querySelectorAll(".case")) {
    const text = item.textContent.toLowerCase();
    item.hidden = !(item.matches($("which").value) && words.every((word) => text.includes(word)));
  }
  const seen = cases.filter((one) => !one.card.hidden).length;
  $("shown").textContent = `${seen} of ${cases.length} shown`;
}

// The run's table with the corrected points in it, and which they are.
function table() {
  const rows = [...cases].sort((a, b) => a.at - b.at).map((one) => {
    if (!corrected(one)) return one.row + ",no\n";
    const cells = one.points.map(([x, y]) => `"(${x.toFixed(4)}, ${y.toFixed(4)})"`);
    const angle = angleOf(one.points, one.pixel).toFixed(4);
    const doubt = TAIL.exec(one.row)[4];
    return [one.row.replace(TAIL, ""), ...cells, angle, doubt, "yes\n"].join(",");
  });
  return [list.dataset.header + ",Corrected\n", ...rows];
}

$("save").onclick = () => {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob(table(), {type: "text/csv;charset=utf-8"}));
  link.download = list.dataset.table;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60000);
  unkept = false;
};
// The rows of a CSV: the line each begins on, and its cells; ["?"] where its quotes do not pair.
function rowsOf(text) {
  const cell = /(?:"([^"]*(?:""[^"]*)*)"|([^",\r\n]*))(,|\r?\n)/y, rows = [];
  let cells = [], from = 1, line = 1;  // a cell in quotes may hold line ends
  for (let at = 0, end; at < text.length; at = end) {
    cell.lastIndex = at;
    const found = cell.exec(text);
    end = found ? cell.lastIndex : text.indexOf("\n", at) + 1;
    line += text.slice(at, end).split("\n").length - 1;
    if (found) cells.push(found[2] ?? found[1].replaceAll('""', '"'));
    if (found && found[3] === ",") continue;
    rows.push([from, found ? cells : ["?"]]);
    [cells, from] = [[], line];
  }
  return rows;
}

function record(names, cells) {
  return Object.fromEntries(names.map((name, k) => [name, cells[k]]));
}

function keyOf(row) { return JSON.stringify([row.Filename, row.Frame || ""]); }

// What is not ours, among words: what cannot be shown there, or would turn them, as its code.
function quoted(text) {
  const code = (c) => `\\u{${c.codePointAt().toString(16)}}`;
  return `'${text.replace(/[\p{C}\p{Zl}\p{Zp}]/gu, code)}'`;
}

// Apply a row of a saved table; returns why that cannot be, or "".
function apply(names, cells, known) {
  if (cells.length !== names.length) return "its cells do not fit the first line";
  const row = record(names, cells), one = known.get(keyOf(row));
  if (row.Corrected !== "yes") return `Corrected is ${quoted(row.Corrected)}, expected yes or no`;
  const frame = row.Frame ? `, frame ${quoted(row.Frame)}` : "";
  if (!one) return `this report has no ${quoted(row.Filename)}${frame}`;
  const points = NAMES.map((name) => (POINT.exec(row[name]) || []).slice(1).map(Number));
  const isInside = (value, i) => value >= -0.5 && value <= one.size[i] - 0.5;
  const bad = NAMES.find((_, k) => !(points[k].length && points[k].every(isInside)));
  if (bad) return `${bad} is ${quoted(row[bad])}, expected (x, y) in px inside the image`;
  if (Number.isNaN(angleOf(points, one.pixel))) return "PS2 or FH1 equals PS1: there is no angle";
  set(one, points);
  return "";
}

// Apply the corrections of a saved table; returns what came of it, in words.
function load(text) {
  const [[, names], ...rows] = rowsOf(text + "\n");
  const lacking = COLUMNS.filter((name) => !names.includes(name)).join(", ");
  if (lacking) return `nothing loaded: it lacks ${lacking}; expected a table saved by this page.`;
  const header = list.dataset.header.split(",");
  const own = rowsOf(cases.map((one) => one.row + "\n").join(""));
  const known = new Map(own.map(([, cells], k) => [keyOf(record(header, cells)), cases[k]]));
  const column = names.indexOf("Corrected");
  const wanted = rows.filter(([, cells]) => cells[column] !== "no" && String(cells));  // nor empty
  const refused = wanted.map(([line, cells]) => [line, apply(names, cells, known)])
    .filter(([, why]) => why).map(([line, why]) => `line ${line}: ${why}`);
  const told = `${wanted.length - refused.length} of ${wanted.length} corrections loaded.`;
  if (!refused.length) return told;
  const more = refused.length > MOST ? `; and ${refused.length - MOST} more` : "";
  return `${told} Not loaded: ${refused.slice(0, MOST).join("; ")}${more}.`;
}

$("pick").onclick = () => $("load").click();
$("load").onchange = async () => {
  const [file] = $("load").files;
  if (!file) return;
  const text = await file.text().catch(() => null);
  const told = text === null ? "cannot be read." : load(text);
  $("load").value = "";  // so that the same file can be chosen again
  keep();
  filter();
  $("notice").textContent = `${quoted(file.name)}: ${told}`;
  $("notice").scrollIntoView({block: "center"});
};
$("filter").oninput = $("which").onchange = filter;
onresize = () => { if (editor.open) refresh(); };
onbeforeunload = (event) => { if (unkept) event.preventDefault(); };
onbeforeprint = () => { for (const img of document.images) img.loading = "eager"; };
$("controls").hidden = false;
restore();
filter();
