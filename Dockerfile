# The serve role as a container: `make image`, or  docker build --target serve -t rsm-serve .
#
#     docker run --rm -p 127.0.0.1:8001:8001 -p 127.0.0.1:8002:8002 -v "$PWD/models:/models:ro" rsm-serve
#
# serves every policy of ./models on port 8001, and /metrics and /healthz on 8002, as an unprivileged user. The server
# writes no files in the container, so --read-only works. Options after the image's name replace CMD. On a shared
# network, use the certificates and tokens of ./secrets, and a health check that trusts them:
#
#     docker run --rm -p 8001:8001 -v "$PWD/models:/models:ro" -v "$PWD/secrets:/secrets:ro" \
#         -e RSM_TLS_CA=/secrets/ca.pem --health-cmd "rsm-client health --address grpcs://localhost:8001" \
#         rsm-serve --repo /models --address 0.0.0.0:8001 --http 0.0.0.0:8002 \
#         --tls-cert /secrets/server.pem --tls-key /secrets/server.key --act-token-file /secrets/act_tokens
#
# BASE_IMAGE is any glibc image with python3 (3.10 or newer) and its venv module. Both stages use it.
ARG BASE_IMAGE=python:3.12-slim-bookworm

FROM ${BASE_IMAGE} AS build
WORKDIR /src
# /build has pip. The shipped environment, /opt/rsm, has none.
RUN python3 -m venv /build && python3 -m venv --without-pip /opt/rsm
COPY requirements.lock pyproject.toml README.md LICENSE ./
# Optional secrets: pip's settings and certificates of the building machine. They are not stored in a layer.
RUN --mount=type=secret,id=pip_conf,target=/etc/pip.conf --mount=type=secret,id=ca,target=/etc/pip-ca.pem \
    /build/bin/pip install --no-cache-dir -c requirements.lock hatchling
# Dependencies come first, so that a change of our own code reuses their layer.
RUN --mount=type=secret,id=pip_conf,target=/etc/pip.conf --mount=type=secret,id=ca,target=/etc/pip-ca.pem \
    mkdir rsm_common rsm_train rsm_serve rsm_eval export export/rsm_export \
    && /build/bin/pip wheel --no-cache-dir --no-build-isolation -c requirements.lock -w /wheels ".[serve]" \
    && rm /wheels/rsm_toolkit-*.whl
COPY . .
RUN /build/bin/pip wheel --no-cache-dir --no-build-isolation --no-deps -w /wheels . \
    && /build/bin/pip --python /opt/rsm/bin/python install --no-cache-dir --no-index --find-links /wheels \
        -c requirements.lock "rsm-toolkit[serve]"

FROM ${BASE_IMAGE} AS serve
LABEL org.opencontainers.image.title="rsm-serve" \
      org.opencontainers.image.description="Serves exported diffusion policies to robots over gRPC" \
      org.opencontainers.image.licenses="Apache-2.0"
RUN useradd --uid 10001 --user-group --no-create-home --shell /usr/sbin/nologin rsm && mkdir /models
COPY --from=build /opt/rsm /opt/rsm
# Switch off ONNX Runtime's telemetry.
ENV PATH=/opt/rsm/bin:$PATH PYTHONUNBUFFERED=1 ORT_DISABLE_TELEMETRY=1
USER rsm
WORKDIR /models
EXPOSE 8001 8002
# SIGTERM drains the server: it refuses new requests and answers the queued ones.
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s --retries=3 \
    CMD ["rsm-client", "health", "--address", "127.0.0.1:8001"]
ENTRYPOINT ["rsm-serve"]
# Clients reach a container through its network, so the server cannot listen on loopback. --insecure accepts
# plaintext: publish the port to the host's loopback, or use a trusted network.
CMD ["--repo", "/models", "--address", "0.0.0.0:8001", "--http", "0.0.0.0:8002", "--insecure"]
