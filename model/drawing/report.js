"use strict";
// Draws the cases of report.html, and lets a person correct their landmarks.
// "Image px" are those of landmarks.csv: integers are pixel centres. "Picture units" are those of
// the SVGs: their origin is the image's corner, and pixels are square.

const NAMES = ["PS1", "PS2", "FH1"];
// The end of a row of landmarks.csv: three points, the angle, the doubt.
const TAIL = /,"\(([^"]*)\)","\(([^"]*)\)","\(([^"]*)\)",[\d.]+,((?:"(?:[^"]|"")*")?[^,"]*)$/;
const NEEDED_COLUMNS = ["Filename", ...NAMES, "Corrected"];
const POINT = /^\((-?[\d.]+), ?(-?[\d.]+)\)$/;
const MOST_REFUSED = 10;  // lines named in the notice
const ARROWS = {ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1]};
const CORNERS = ["top left", "top right", "bottom left", "bottom right"];
const RING = 9;  // radius in screen px
const GRAB = 36;  // screen px within which a landmark is grabbed

const $ = (id) => document.getElementById(id);
const list = $("cases"), editor = $("editor"), stage = $("stage"), loupe = $("loupe");
const storageKey = "aop-report " + list.dataset.digest;
const cases = [...list.children].map(readCard), handles = NAMES.map(makeHandle);
let open = null, active = 2;  // the case in the editor; the landmark under the loupe
let grabbed = null, unsaved = false;

// ---- Cases: their geometry and their drawing

// A case from its card. data-case holds `row` (its line of landmarks.csv), `index` (that line's
// number), `size` (px) and `pixelShape` (mm, or 1 x 1).
function readCard(card) {
  const entry = {card, ...JSON.parse(card.dataset.case)};
  entry.modelPoints = TAIL.exec(entry.row).slice(1, 4).map((cell) => cell.split(", ").map(Number));
  entry.points = entry.modelPoints;
  const finest = Math.min(...entry.pixelShape);
  entry.scale = entry.pixelShape.map((side) => side / finest);  // picture units in an image px
  entry.pictureSize = entry.size.map((side, i) => side * entry.scale[i]);
  entry.longSide = Math.max(...entry.pictureSize);
  entry.svg = card.querySelector("svg");
  if (entry.svg) {
    entry.svg.setAttribute("viewBox", `0 0 ${entry.pictureSize.join(" ")}`);
    drawCase(entry, entry.svg, 0.018 * entry.longSide);
    card.querySelector("button").onclick = () => openEditor(entry);
  }
  return entry;
}

// The unsigned angle PS2-PS1-FH1 in degrees; NaN if PS2 or FH1 equals PS1.
function angleOf(points, pixelShape) {
  const [u, v] = [1, 2].map(
    (k) => [0, 1].map((i) => (points[k][i] - points[0][i]) * pixelShape[i]));
  const cosine = (u[0] * v[0] + u[1] * v[1]) / (Math.hypot(...u) * Math.hypot(...v));
  return Math.acos(Math.min(1, Math.max(-1, cosine))) * 180 / Math.PI;
}

function angleText(entry, points) {
  return angleOf(points, entry.pixelShape).toFixed(1) + "°";
}

// Image px -> picture units.
function toPicture(entry, point) {
  return point.map((value, i) => (value + 0.5) * entry.scale[i]);
}

// Where a mouse or touch event happened in the editor, in image px.
function toImage(entry, event) {
  const screen = new DOMPoint(event.clientX, event.clientY);
  const {x, y} = screen.matrixTransform(stage.getScreenCTM().inverse());
  return [x / entry.scale[0] - 0.5, y / entry.scale[1] - 0.5];
}

function addSvg(parent, name, attributes) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  return parent.appendChild(element);
}

function setRing(ring, [x, y], radius) {
  for (const [key, value] of [["cx", x], ["cy", y], ["r", radius]]) ring.setAttribute(key, value);
}

// An SVG path: symphysis, tangent on past FH1, and the arc the short way from PS2 to FH1.
function measurementPath(entry) {
  const [ps1, ps2, fh1] = entry.points.map((point) => toPicture(entry, point));
  const u = [ps2[0] - ps1[0], ps2[1] - ps1[1]], v = [fh1[0] - ps1[0], fh1[1] - ps1[1]];
  const lengths = [Math.hypot(...u), Math.hypot(...v)];
  const radius = Math.min(0.4 * Math.min(...lengths), 0.09 * entry.longSide);
  const from = ps1.map((value, i) => value + u[i] * radius / lengths[0]);
  const to = ps1.map((value, i) => value + v[i] * radius / lengths[1]);
  const end = ps1.map((value, i) => value + v[i] * 1.25);
  const sweep = u[0] * v[1] - u[1] * v[0] > 0 ? 1 : 0;
  return `M${ps2} L${ps1} L${end} M${from} A${radius} ${radius} 0 0 ${sweep} ${to}`;
}

// Draw or move a case's lines and rings in an SVG; the radius is in picture units.
function drawCase(entry, parent, radius) {
  const [halo, line] = ["halo", "line"].map(
    (name) => parent.querySelector("." + name) || addSvg(parent, "path", {class: name}));
  for (const path of [halo, line]) path.setAttribute("d", measurementPath(entry));
  NAMES.forEach((name, k) => {
    const ring = parent.querySelector("circle." + name) || addSvg(parent, "circle", {class: name});
    setRing(ring, toPicture(entry, entry.points[k]), radius);
  });
}

// ---- Corrections

function isCorrected(entry) { return entry.points !== entry.modelPoints; }

// Give a case other points. The model's own points undo its correction.
function setPoints(entry, points) {
  entry.points = String(points) === String(entry.modelPoints) ? entry.modelPoints : points;
  const corrected = isCorrected(entry);
  entry.card.classList.toggle("corrected", corrected);
  entry.card.querySelector(".mark").textContent = corrected ? "corrected" : "";
  entry.card.querySelector(".angle").textContent = angleText(entry, entry.points);
  entry.card.querySelector(".was").textContent =
    corrected ? `The model said ${angleText(entry, entry.modelPoints)}.` : "";
  if (entry.svg) drawCase(entry, entry.svg, 0.018 * entry.longSide);
  const count = cases.filter(isCorrected).length;
  $("count").textContent = count;
  $("save").disabled = !count;
}

// Keep corrections in the browser, so that they outlive a closed tab: numbers only, under the
// digest of the table that they correct.
function storeCorrections() {
  const corrections = cases.filter(isCorrected).map((entry) => [entry.index, entry.points]);
  try {
    localStorage.setItem(storageKey, JSON.stringify(corrections));
  } catch (error) {
    unsaved = true;
    $("notice").textContent =
      `This browser cannot keep corrections (${error.name}); save them before you leave.`;
  }
}

function restoreCorrections() {
  try {
    const corrections = JSON.parse(localStorage.getItem(storageKey)) || [];
    const known = new Map(cases.map((entry) => [entry.index, entry]));
    for (const [index, points] of corrections)
      if (known.has(index) && !Number.isNaN(angleOf(points, [1, 1])))
        setPoints(known.get(index), points);
    if (corrections.length)
      $("notice").textContent = "Corrections made here earlier are shown again.";
  } catch (error) {
    $("notice").textContent = `Corrections made here earlier cannot be read (${error.name}).`;
  }
}

// ---- The editor

function makeHandle(name, k) {
  const group = addSvg(stage, "g", {tabindex: 0, role: "slider", "aria-label": name, class: name,
    "aria-valuemin": 0, "aria-valuemax": 180, fill: "currentColor"});
  addSvg(group, "circle", {class: name});
  addSvg(group, "text", {}).textContent = name;
  group.onfocus = () => { active = k; magnify(); };
  group.onkeydown = (event) => {
    const way = ARROWS[event.key];
    if (!way) return;
    event.preventDefault();
    const step = event.shiftKey ? 10 : 1;  // px
    moveLandmark(k, open.points[k].map((value, i) => value + way[i] * step));
  };
  return group;
}

// Move a landmark of the open case, within the image, to a point in image px.
function moveLandmark(k, point) {
  const inside = point.map((value, i) => Math.min(Math.max(value, -0.5), open.size[i] - 0.5));
  const points = open.points.map((old, j) => j === k ? inside.map((v) => +v.toFixed(4)) : old);
  if (Number.isNaN(angleOf(points, open.pixelShape))) return;
  setPoints(open, points);
  storeCorrections();
  refreshEditor();
}

function openEditor(entry) {
  open = entry;
  grabbed = null;
  const [width, height] = entry.pictureSize, drawing = $("drawing");
  stage.setAttribute("viewBox", `0 0 ${width} ${height}`);
  drawing.replaceChildren();
  const href = entry.card.querySelector("img").src;
  addSvg(drawing, "image", {href, width, height, preserveAspectRatio: "none"});
  $("name").textContent = entry.card.querySelector("bdi").textContent;
  const shown = cases.filter((other) => other.svg && !other.card.hidden);
  const place = shown.indexOf(entry);
  $("place").textContent = `${place + 1} of ${shown.length} shown`;
  for (const [id, other] of [["previous", shown[place - 1]], ["next", shown[place + 1]]]) {
    $(id).disabled = !other;
    $(id).onclick = () => openEditor(other);
  }
  const wasClosed = !editor.open, focused = document.activeElement;
  if (wasClosed) editor.showModal();
  if (wasClosed || focused.disabled) $($("next").disabled ? "close" : "next").focus();
  refreshEditor();
}

function refreshEditor() {
  const unit = 1 / stage.getScreenCTM().a;  // picture units in a screen px
  drawCase(open, $("drawing"), RING * unit);
  handles.forEach((group, k) => {
    const [x, y] = toPicture(open, open.points[k]);
    setRing(group.querySelector("circle"), [x, y], RING * unit);
    const text = group.querySelector("text"), left = NAMES[k] === "PS2";
    text.setAttribute("transform",
      `translate(${x + (left ? -13 : 13) * unit} ${y - 10 * unit}) scale(${16 * unit})`);
    text.setAttribute("text-anchor", left ? "end" : "start");
    const position = open.points[k].map((value) => value.toFixed(1)).join(", ");
    group.setAttribute("aria-valuenow", angleOf(open.points, open.pixelShape).toFixed(1));
    group.setAttribute("aria-valuetext", `${position} px, angle ${angleText(open, open.points)}`);
    $("at-" + NAMES[k]).textContent = position + " px";
  });
  $("angle").textContent = angleText(open, open.points);
  $("mark").textContent = isCorrected(open) ? "corrected" : "";
  $("remarks").replaceChildren(
    ...[...open.card.querySelectorAll(".remark")].map((element) => element.cloneNode(true)));
  $("reset").disabled = !isCorrected(open);
  magnify();
}

// Show the surroundings of the active landmark in the loupe.
function magnify() {
  const [x, y] = toPicture(open, open.points[active]), half = open.longSide / 16;
  loupe.setAttribute("viewBox", `${x - half} ${y - half} ${2 * half} ${2 * half}`);
  loupe.querySelector(".cross").setAttribute("d",
    `M${x - half / 6} ${y}h${half / 3} M${x} ${y - half / 6}v${half / 3}`);
  loupe.setAttribute("class", CORNERS[freeCorner()]);
}

// The corner of the picture that is furthest from all landmarks, as an index of CORNERS.
function freeCorner() {
  const [width, height] = open.pictureSize;
  const points = open.points.map((point) => toPicture(open, point));
  const distances = [[0, 0], [1, 0], [0, 1], [1, 1]].map(([i, j]) => Math.min(
    ...points.map(([x, y]) => Math.hypot(x - i * width, y - j * height))));
  return distances.indexOf(Math.max(...distances));
}

stage.onpointerdown = (event) => {
  const matrix = stage.getScreenCTM();
  const distances = open.points.map((point) => {
    const screen = new DOMPoint(...toPicture(open, point)).matrixTransform(matrix);
    return Math.hypot(screen.x - event.clientX, screen.y - event.clientY);
  });
  const k = distances.indexOf(Math.min(...distances));
  if (distances[k] > GRAB) return;
  event.preventDefault();
  const pointer = toImage(open, event);
  // The landmark keeps its distance from the pointer, so that it does not jump.
  grabbed = {k, shift: open.points[k].map((value, i) => value - pointer[i])};
  stage.setPointerCapture(event.pointerId);
  handles[k].focus();
};
stage.onpointermove = (event) => {
  if (!grabbed) return;
  moveLandmark(grabbed.k, toImage(open, event).map((value, i) => value + grabbed.shift[i]));
};
stage.onpointerup = stage.onpointercancel = () => { grabbed = null; };
editor.onkeydown = (event) => {
  const button = {PageDown: $("next"), PageUp: $("previous")}[event.key];
  if (!button) return;
  event.preventDefault();
  button.click();
};
$("reset").onclick = () => {
  setPoints(open, open.modelPoints);
  storeCorrections();
  refreshEditor();
};
$("close").onclick = () => editor.close();
editor.onclose = () => open.card.querySelector("button").focus();

// ---- The filter

function filterCases() {
  const words = $("filter").value.toLowerCase().split(/\s+/).filter(Boolean);
  for (const item of document.querySelectorAll(".case")) {
    const text = item.textContent.toLowerCase();
    item.hidden = !(item.matches($("which").value) && words.every((word) => text.includes(word)));
  }
  const shown = cases.filter((entry) => !entry.card.hidden).length;
  $("shown").textContent = `${shown} of ${cases.length} shown`;
}

// ---- Saving corrections

// The lines of landmarks.csv with the corrected points, and a column that says which they are.
function correctedTable() {
  const rows = [...cases].sort((a, b) => a.index - b.index).map((entry) => {
    if (!isCorrected(entry)) return entry.row + ",no\n";
    const cells = entry.points.map(([x, y]) => `"(${x.toFixed(4)}, ${y.toFixed(4)})"`);
    const angle = angleOf(entry.points, entry.pixelShape).toFixed(4);
    const doubt = TAIL.exec(entry.row)[4];
    return [entry.row.replace(TAIL, ""), ...cells, angle, doubt, "yes\n"].join(",");
  });
  return [list.dataset.header + ",Corrected\n", ...rows];
}

$("save").onclick = () => {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob(correctedTable(), {type: "text/csv;charset=utf-8"}));
  link.download = list.dataset.table;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60000);
  unsaved = false;
};

// ---- Loading corrections

// The rows of a CSV text: the line that each begins on, from 1, and its cells. A row whose quotes
// do not pair has the cells ["?"].
function parseCsv(text) {
  const cell = /(?:"([^"]*(?:""[^"]*)*)"|([^",\r\n]*))(,|\r?\n)/y, rows = [];
  let cells = [], firstLine = 1, line = 1;  // a quoted cell may contain line ends
  for (let start = 0, end; start < text.length; start = end) {
    cell.lastIndex = start;
    const match = cell.exec(text);
    end = match ? cell.lastIndex : text.indexOf("\n", start) + 1;
    line += text.slice(start, end).split("\n").length - 1;
    if (match) cells.push(match[2] ?? match[1].replaceAll('""', '"'));
    if (match && match[3] === ",") continue;
    rows.push([firstLine, match ? cells : ["?"]]);
    [cells, firstLine] = [[], line];
  }
  return rows;
}

function toRecord(names, cells) {
  return Object.fromEntries(names.map((name, k) => [name, cells[k]]));
}

function recordKey(record) { return JSON.stringify([record.Filename, record.Frame || ""]); }

// Foreign text for a sentence, in quotes. Characters that cannot be shown, or that change the
// writing direction, appear as their codes.
function quote(text) {
  const code = (c) => `\\u{${c.codePointAt().toString(16)}}`;
  return `'${text.replace(/[\p{C}\p{Zl}\p{Zp}]/gu, code)}'`;
}

// Apply a row of a saved table; returns why it is refused, or "".
function applyRow(names, cells, known) {
  if (cells.length !== names.length) return "its cells do not fit the first line";
  const record = toRecord(names, cells), entry = known.get(recordKey(record));
  if (record.Corrected !== "yes")
    return `Corrected is ${quote(record.Corrected)}, expected yes or no`;
  const frame = record.Frame ? `, frame ${quote(record.Frame)}` : "";
  if (!entry) return `this report has no ${quote(record.Filename)}${frame}`;
  const points = NAMES.map((name) => (POINT.exec(record[name]) || []).slice(1).map(Number));
  const isInside = (value, i) => value >= -0.5 && value <= entry.size[i] - 0.5;
  const bad = NAMES.find((_, k) => !(points[k].length && points[k].every(isInside)));
  if (bad) return `${bad} is ${quote(record[bad])}, expected (x, y) in px inside the image`;
  if (Number.isNaN(angleOf(points, entry.pixelShape)))
    return "PS2 or FH1 equals PS1, so there is no angle";
  setPoints(entry, points);
  return "";
}

// Apply the corrections of a saved table; returns a sentence on the outcome.
function applyTable(text) {
  const [[, names], ...rows] = parseCsv(text + "\n");
  const missing = NEEDED_COLUMNS.filter((name) => !names.includes(name)).join(", ");
  if (missing) return `nothing loaded: it lacks ${missing}; expected a table saved by this page.`;
  const header = list.dataset.header.split(",");
  const own = parseCsv(cases.map((entry) => entry.row + "\n").join(""));
  const known = new Map(
    own.map(([, cells], k) => [recordKey(toRecord(header, cells)), cases[k]]));
  const column = names.indexOf("Corrected");
  const isEmpty = (cells) => !String(cells);
  const wanted = rows.filter(([, cells]) => cells[column] !== "no" && !isEmpty(cells));
  const refused = wanted.map(([line, cells]) => [line, applyRow(names, cells, known)])
    .filter(([, why]) => why).map(([line, why]) => `line ${line}: ${why}`);
  const outcome = `${wanted.length - refused.length} of ${wanted.length} corrections loaded.`;
  if (!refused.length) return outcome;
  const rest = refused.length - MOST_REFUSED, more = rest > 0 ? `; and ${rest} more` : "";
  return `${outcome} Not loaded: ${refused.slice(0, MOST_REFUSED).join("; ")}${more}.`;
}

$("pick").onclick = () => $("load").click();
$("load").onchange = async () => {
  const [file] = $("load").files;
  if (!file) return;
  const text = await file.text().catch(() => null);
  const outcome = text === null ? "cannot be read." : applyTable(text);
  $("load").value = "";  // so that the same file can be chosen again
  storeCorrections();
  filterCases();
  $("notice").textContent = `${quote(file.name)}: ${outcome}`;
  $("notice").scrollIntoView({block: "center"});
};

// ---- The page

$("filter").oninput = $("which").onchange = filterCases;
onresize = () => { if (editor.open) refreshEditor(); };
onbeforeunload = (event) => { if (unsaved) event.preventDefault(); };
onbeforeprint = () => { for (const img of document.images) img.loading = "eager"; };
$("controls").hidden = false;
restoreCorrections();
filterCases();
