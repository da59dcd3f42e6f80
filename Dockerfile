# The inference image, for Linux on x86-64.
#   docker build -t aop .                                  CUDA 12 (driver 525 or newer) and CPU
#   docker build -t aop --build-arg RUNTIME=cpu .          CPU only, several GB smaller
#   docker build -t aop --build-arg API_METHOD=invoke .    a server for grand-challenge's invoke mode
#   ... --build-arg LANDMARKS_FILE=my-points.json          answers under the names of a challenge
FROM python:3.11-slim-bookworm

ARG RUNTIME=cuda
ARG API_METHOD=exec
ARG LANDMARKS_FILE
ARG ANGLE_FILE
ARG THREE_POINTS_FILE
ARG FRAME_OF_ANSWERS
LABEL org.grand-challenge.api-method=$API_METHOD
ENV AOP_API_METHOD=$API_METHOD \
    AOP_LANDMARKS_FILE=$LANDMARKS_FILE \
    AOP_ANGLE_FILE=$ANGLE_FILE \
    AOP_THREE_POINTS_FILE=$THREE_POINTS_FILE \
    AOP_FRAME_OF_ANSWERS=$FRAME_OF_ANSWERS \
    PYTHONUNBUFFERED=1 \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility

WORKDIR /opt/app
COPY model/locks model/locks
RUN case "$API_METHOD" in exec|invoke) ;; \
      *) echo "API_METHOD is '$API_METHOD', expected exec or invoke" >&2; exit 1 ;; \
    esac \
 && case "$RUNTIME" in cuda|cpu) ;; \
      *) echo "RUNTIME is '$RUNTIME', expected cuda or cpu" >&2; exit 1 ;; \
    esac \
 && pip install --no-cache-dir --require-hashes -r "model/locks/$RUNTIME.txt"
COPY . .
# byte code is compiled here because the running container cannot write it
RUN python -m compileall -q process.py model

EXPOSE 4743
USER 10001:10001
ENTRYPOINT ["python", "/opt/app/process.py"]
