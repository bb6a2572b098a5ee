# CPU:  docker build -t longspan .    (without CUDA's libraries: --build-arg TORCH_INDEX_URL=<PyTorch's index of CPU builds>)
# CUDA: docker build --build-arg DEVICE=cuda -t longspan:cuda .    (run with --gpus all)
# Run:  docker run -p 50051:50051 -v longspan-models:/var/cache/longspan -v ./access:/access:ro \
#         -e LONGSPAN_TLS_CERTIFICATE=/access/server.pem -e LONGSPAN_TLS_KEY=/access/server.key \
#         -e LONGSPAN_IDENTITIES=/access/identities.toml longspan          (docs/operations.md, Access)
# Without TLS and identities it is refused unless that is said, and should be published on this machine only:
#       docker run -e LONGSPAN_INSECURE=true -p 127.0.0.1:50051:50051 -v longspan-models:/var/cache/longspan longspan
ARG PYTHON=3.12

FROM python:${PYTHON}-slim AS build

# The wheel carries native code, compiled for every level of this architecture; the image needs no C++ compiler.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*

# cpu or cuda. A plain torch wheel for Linux on x86-64 is the CUDA build, several GB with its libraries;
# CPU builds carry "+cpu" in their version and come from an index of their own. Where none is named, the plain build
# serves a CPU as well.
ARG DEVICE=cpu
ARG TORCH_INDEX_URL=
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1

WORKDIR /build
COPY constraints.txt requirements.lock ./
# The lock has the hashes of all but torch, whose files are others on each index.
RUN python -m venv /opt/longspan \
    && /opt/longspan/bin/pip install --require-hashes --no-deps -r requirements.lock \
    && case "$DEVICE" in cpu) build=${TORCH_INDEX_URL:++cpu} ;; cuda) build= ;; *) echo "DEVICE is cpu or cuda, not $DEVICE" >&2; exit 1 ;; esac \
    && if [ "$DEVICE$TORCH_INDEX_URL" = cpu ]; then echo "TORCH_INDEX_URL names no index of CPU builds:" \
        "installing the plain torch, which on x86-64 brings several GB of CUDA libraries" >&2; fi \
    && sed -i "s/^torch==.*/&${build}/" constraints.txt \
    && /opt/longspan/bin/pip install ${TORCH_INDEX_URL:+--extra-index-url "$TORCH_INDEX_URL"} -c constraints.txt torch

COPY pyproject.toml hatch_build.py README.md LICENSE ./
COPY attention attention
COPY server server
COPY proto proto
COPY loadtest loadtest
RUN /opt/longspan/bin/pip wheel --no-deps --wheel-dir dist . \
    && /opt/longspan/bin/pip install -c constraints.txt "$(echo dist/longspan-*.whl)[server,otel]"

FROM python:${PYTHON}-slim

# Triton compiles the C code that launches its kernels when it is first used.
ARG DEVICE=cpu
# hadolint ignore=DL3008
RUN if [ "$DEVICE" = cuda ]; then apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*; fi

RUN useradd --create-home --user-group --uid 10001 longspan \
    && install --directory --owner longspan --group longspan /var/cache/longspan
COPY --from=build /opt/longspan /opt/longspan
ENV PATH=/opt/longspan/bin:$PATH \
    LONGSPAN_CACHE_DIR=/var/cache/longspan

USER 10001:10001
WORKDIR /home/longspan
VOLUME /var/cache/longspan
EXPOSE 50051 9464

# The first start fetches and converts the model. By HTTP, since over gRPC a probe is closed where other clients hold all
# connections. A port given as a flag is unknown here: set LONGSPAN_METRICS_PORT. Where the server has --metrics-tls set
# LONGSPAN_METRICS_TLS, LONGSPAN_CA and LONGSPAN_SERVER_NAME; where it has --no-metrics, --health-cmd "longspan health".
HEALTHCHECK --interval=10s --timeout=10s --start-period=10m --retries=3 CMD ["longspan", "health", "--http"]
ENTRYPOINT ["longspan"]
# On all addresses, so that the container's ports can be published: refused without TLS and identities, or --insecure.
CMD ["serve", "--host", "0.0.0.0", "--metrics-host", "0.0.0.0"]
