# A GPU image: docker build -t sera-serve . && docker run --gpus all -p 8000:8000 -v adapters:/store sera-serve
# It listens on 0.0.0.0, so every request needs a key. The first one, before or while the server runs:
#   docker run --rm -v adapters:/store sera-serve keys create --store /store --tenant acme --scopes infer,publish
# torch brings the CUDA libraries that it was built with. Ubuntu 24.04 has Python 3.12. The digest is that of the index
# of all platforms; find the digest of another tag with: docker buildx imagetools inspect nvidia/cuda:TAG
# With a base from the hub:
#   docker run --gpus all -p 8000:8000 -v adapters:/store -v models:/home/sera/.cache/huggingface \
#     sera-serve serve --base HUB_ID --dtype bfloat16
FROM nvidia/cuda:13.0.2-runtime-ubuntu24.04@sha256:6a0e31b59e70890446f2c17356d6efc0d54260090a8c63d6ca7c2ad049db95d2 AS build

# Ubuntu keeps the newest version of a package alone: a pinned one could soon not be installed.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install -y --no-install-recommends python3 python3-venv \
 && rm -rf /var/lib/apt/lists/*

# pip has an environment of its own, so that the final stage gets none.
RUN python3 -m venv /opt/pip && python3 -m venv --without-pip /opt/sera
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src
# Dependencies in a layer of their own: a change of the code does not download torch again.
COPY requirements.lock ./
RUN /opt/pip/bin/pip --python /opt/sera/bin/python install --require-hashes --only-binary :all: -r requirements.lock
COPY pyproject.toml README.md ./
COPY adapters_store adapters_store
COPY kernels kernels
COPY deploy deploy
COPY sera_serve sera_serve
# Nothing is downloaded: the lock has the build's setuptools too. Then pip itself checks that nothing is missing.
RUN /opt/pip/bin/pip --python /opt/sera/bin/python install --no-index --no-deps --no-build-isolation . \
 && /opt/pip/bin/pip --python /opt/sera/bin/python check


FROM nvidia/cuda:13.0.2-runtime-ubuntu24.04@sha256:6a0e31b59e70890446f2c17356d6efc0d54260090a8c63d6ca7c2ad049db95d2

# At its first launch Triton compiles one C file, which includes Python.h: so the C compiler and these headers are needed
# where the server runs. C++, make and the rest of build-essential are not.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install -y --no-install-recommends python3 gcc libc6-dev libpython3.12-dev \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --create-home --uid 10001 sera \
 && install -d -o sera -g sera /store /home/sera/.cache/huggingface

COPY --from=build /opt/sera /opt/sera

USER 10001
WORKDIR /home/sera
ENV PATH=/opt/sera/bin:$PATH PYTHONUNBUFFERED=1 \
    SERA_SERVE_STORE=/store SERA_SERVE_HOST=0.0.0.0 SERA_SERVE_PORT=8000 SERA_SERVE_DEVICE=cuda
VOLUME /store
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s --retries=3 \
  CMD ["python", "-c", "import os, urllib.request as u; u.urlopen('http://127.0.0.1:' + os.environ['SERA_SERVE_PORT'] + '/readyz', timeout=4)"]
ENTRYPOINT ["sera-serve"]
CMD ["serve"]
