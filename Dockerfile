# A GPU image: docker build -t sera-serve . && docker run --gpus all -p 8000:8000 -v adapters:/store sera-serve
# torch brings the CUDA libraries it was built with; Ubuntu 24.04 has Python 3.12.
FROM nvidia/cuda:13.0.2-runtime-ubuntu24.04

# gcc and the headers: triton compiles a launcher for each kernel.
RUN apt-get update \
 && apt-get install -y --no-install-recommends python3 python3-venv python3-dev gcc libc6-dev \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --create-home --uid 10001 sera \
 && install -d -o sera -g sera /store

ENV PATH=/opt/sera/bin:$PATH PIP_NO_CACHE_DIR=1 PYTHONUNBUFFERED=1
WORKDIR /src
# Dependencies in layers of their own: a change of the code does not download torch again.
COPY constraints.txt ./
RUN python3 -m venv /opt/sera && pip install -c constraints.txt torch==2.13.0
COPY pyproject.toml README.md ./
COPY adapters_store adapters_store
COPY kernels kernels
COPY sera_serve sera_serve
RUN pip install -c constraints.txt .

USER sera
WORKDIR /home/sera
ENV SERA_SERVE_STORE=/store SERA_SERVE_HOST=0.0.0.0 SERA_SERVE_PORT=8000 SERA_SERVE_DEVICE=cuda
VOLUME /store
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s --retries=3 \
  CMD python -c "import os, urllib.request as u; u.urlopen('http://127.0.0.1:' + os.environ['SERA_SERVE_PORT'] + '/readyz', timeout=4)"
ENTRYPOINT ["sera-serve"]
CMD ["serve"]
