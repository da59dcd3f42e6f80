# Inference only, for Linux on x86-64.
#   docker build -t aop .                                  CUDA 12 (driver 525 or newer), or the CPU
#   docker build -t aop --build-arg RUNTIME=cpu .          several GB smaller, CPU only
#   docker build -t aop --build-arg API_METHOD=invoke .    a server for grand-challenge's invoke mode
FROM python:3.11-slim-bookworm

ARG RUNTIME=cuda
ARG API_METHOD=exec
LABEL org.grand-challenge.api-method=$API_METHOD
ENV AOP_API_METHOD=$API_METHOD \
    PYTHONUNBUFFERED=1 \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility

WORKDIR /opt/app
COPY model/locks model/locks
RUN case "$RUNTIME/$API_METHOD" in \
      cpu/exec|cpu/invoke|cuda/exec|cuda/invoke) ;; \
      *) echo "RUNTIME is '$RUNTIME', expected cuda or cpu;" \
              "API_METHOD is '$API_METHOD', expected exec or invoke" >&2; exit 1 ;; \
    esac \
 && pip install --no-cache-dir --require-hashes -r "model/locks/$RUNTIME.txt"
COPY . .
# byte code is compiled here because the running container cannot write it
RUN python -m compileall -q process.py model

EXPOSE 4743
USER 10001:10001
ENTRYPOINT ["python", "/opt/app/process.py"]
