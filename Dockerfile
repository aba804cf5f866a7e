# Headroom on a CPU: `docker build -t headroom .`, or `docker compose up`.
# The dashboard listens on every address of the container, which has a network of its own; publish its port on the host's
# 127.0.0.1 only, or put a proxy with authentication in front and name its host in HEADROOM_ALLOWED_HOSTS (docs/security.md).
FROM python:3.11-slim-bookworm

# The CPU's kernels are compiled at first use, for the machine that the container runs on: the compiler stays.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/headroom

# What changes rarely comes first: the packages, each with its hash.
COPY .ci/environment.py .ci/environment.py
COPY requirements.lock requirements-cpu.lock requirements-uv.lock ./
RUN python .ci/environment.py --torch cpu --venv /opt/venv

COPY pyproject.toml requirements.txt README.md LICENSE app.py ./
COPY .streamlit/config.toml .streamlit/config.toml
COPY engine engine
COPY kernels kernels
COPY storage storage
COPY pages pages
RUN /opt/venv/bin/python -m pip install --no-cache-dir --no-deps .

RUN useradd --create-home --uid 10001 headroom \
    && install -d -m 0700 -o headroom -g headroom /data
USER 10001
WORKDIR /home/headroom

ENV PATH=/opt/venv/bin:$PATH \
    HEADROOM_HOME=/data \
    HF_HUB_DISABLE_TELEMETRY=1 \
    PYTHONUNBUFFERED=1
VOLUME /data
EXPOSE 8501

HEALTHCHECK --interval=30s --timeout=5s --start-period=60s \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8501/_stcore/health', timeout=4)"]
CMD ["headroom", "run", "--host", "0.0.0.0", "--port", "8501"]
