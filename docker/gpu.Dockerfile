# For GPUs: NVIDIA's PyTorch image, with its torch, CUDA, NCCL and Transformer Engine kept, apex from source, and this
# project with DALI in /opt/emu3/venv.
#
#   docker build --file docker/gpu.Dockerfile --tag emu3-megatron:gpu .
#   enroot import --output /shared/emu3.sqsh dockerd://emu3-megatron:gpu     # for CONTAINER in examples/slurm/settings.sh
ARG BASE=nvcr.io/nvidia/pytorch:25.09-py3
FROM ${BASE}

# The base pins packages of its own by this; ours are pinned by constraints.txt, and torch is kept as it is.
ENV PIP_CONSTRAINT="" \
    PIP_NO_CACHE_DIR=1 \
    PYTHONUNBUFFERED=1

SHELL ["/bin/bash", "-o", "pipefail", "-c"]

# Slow, so first. The registry's package called apex is another project.
ARG APEX_REVISION=25.09
RUN git clone --depth 1 --branch "${APEX_REVISION}" https://github.com/NVIDIA/apex /tmp/apex \
    && APEX_CPP_EXT=1 APEX_CUDA_EXT=1 MAX_JOBS=8 \
       python -m pip install --no-build-isolation --no-deps /tmp/apex \
    && rm -rf /tmp/apex

# Transformer Engine: the base's own where there is one, else built from its source package.
RUN python -c "import transformer_engine.pytorch" \
    || NVTE_FRAMEWORK=pytorch MAX_JOBS=8 python -m pip install --no-build-isolation "transformer-engine[pytorch]>=2.1"

WORKDIR /opt/emu3/source
COPY . .
# DALI is one of the project's dependencies. The environment sees the base's packages.
RUN python tools/setup_environment.py --folder /opt/emu3/venv --extras curation
ENV PATH=/opt/emu3/venv/bin:${PATH} \
    VIRTUAL_ENV=/opt/emu3/venv

CMD ["python", "-m", "emu3_megatron.training", "--capabilities"]
