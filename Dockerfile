# Inference only. docker build -t aop .      with CUDA 12 (driver 525 or newer), or the CPU
#                 docker build -t aop --build-arg RUNTIME=cpu .      several GB smaller, CPU only
FROM python:3.11-slim-bookworm

ARG RUNTIME=cuda
ENV PYTHONUNBUFFERED=1 \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility

WORKDIR /opt/app
COPY requirements.txt ./
RUN case "$RUNTIME" in \
      cpu) ;; \
      cuda) sed -i 's/^onnxruntime==/onnxruntime-gpu[cuda,cudnn]==/' requirements.txt ;; \
      *) echo "RUNTIME is '$RUNTIME', expected cuda or cpu" >&2; exit 1 ;; \
    esac \
 && pip install --no-cache-dir -r requirements.txt
COPY . .
# byte code is compiled here because the running container cannot write it
RUN python -m compileall -q process.py model

USER 10001:10001
ENTRYPOINT ["python", "/opt/app/process.py"]
