# For a CPU: everything but speed. Runs the quickstart and the tests.
#
#   docker build --file docker/cpu.Dockerfile --tag emu3-megatron:cpu .
#   docker run --rm --volume "$PWD/runs:/opt/emu3/source/runs" emu3-megatron:cpu \
#     python tools/quickstart.py --config examples/configs/quickstart.yaml
FROM python:3.11-slim-bookworm

ENV PIP_NO_CACHE_DIR=1 \
    PYTHONUNBUFFERED=1

# Versions of the compiler do not matter, and Debian keeps only the newest.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ git make \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/emu3/source
COPY . .
RUN EMU3_TORCH=cpu python tools/setup_environment.py --folder /opt/emu3/venv
ENV PATH=/opt/emu3/venv/bin:${PATH} \
    VIRTUAL_ENV=/opt/emu3/venv

CMD ["python", "-m", "emu3_megatron.training", "--capabilities"]
