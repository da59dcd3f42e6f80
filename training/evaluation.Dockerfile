# The evaluation container of a challenge. It scores the jobs in /input/predictions.json against the
# ground truth and writes /output/metrics.json. The organizer uploads the ground truth as a .tar.gz of
# cases.csv, together with images/ if points are in the world's frame. The image has no model and no
# torch, and needs no GPU. Build it from the repository's root:
#   git archive HEAD model training ':!model/weights' | \
#     docker build -t aop-evaluation -f training/evaluation.Dockerfile -
#   ... --build-arg OPTIONS="--frame-of-answers pixel --size 512x512 --angle-slug my-angle" -
#   docker save aop-evaluation | gzip > aop-evaluation.tar.gz
# Try it as grand-challenge runs it:
#   docker run --rm --network none -v "$PWD/in":/input:ro -v "$PWD/out":/output \
#     -v "$PWD/truth":/opt/ml/input/data/ground_truth:ro aop-evaluation
FROM python:3.11-slim-bookworm

WORKDIR /opt/app
COPY model/locks model/locks
COPY training/requirements.txt training/
RUN pip install --no-cache-dir --require-hashes -r model/locks/cpu.txt \
 && grep -E '^(matplotlib|scipy|tqdm)==' training/requirements.txt > needed.txt \
 && pip install --no-cache-dir -r needed.txt
COPY . .
RUN python -m compileall -q model training

ARG OPTIONS
ENV EVALUATION_OPTIONS=$OPTIONS \
    MPLCONFIGDIR=/tmp \
    PYTHONUNBUFFERED=1
USER 10001:10001
ENTRYPOINT ["sh", "-c", "exec python -m training.evaluate --predictions /input/predictions.json --truth /opt/ml/input/data/ground_truth $EVALUATION_OPTIONS \"$@\"", "evaluate"]
