# The GPU stack: CUDA 13, torch, Triton, Transformer Engine, nvcc for the Blackwell kernels. Versions are those that CI
# tests; torch's own libraries are then of the image's CUDA (13.0).
#   docker build -t nibble .
#   docker run --gpus all --ipc=host -v "$PWD/runs:/nibble/runs" nibble python train.py model=llama_30m quant=quartet2 ...
FROM nvidia/cuda:13.0.1-cudnn-devel-ubuntu24.04
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
        git python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH PIP_NO_CACHE_DIR=1
WORKDIR /nibble
COPY . .
RUN pip install -c requirements/ci.txt torch setuptools wheel ninja pybind11 \
    && pip install -c requirements/ci.txt -e '.[gpu,hub,wandb,tensorboard,slurm]' \
    && pip install --no-deps nvidia-cutlass==4.2.0.0
# Transformer Engine builds against the torch that is installed: last, and without isolation.
RUN NVTE_FRAMEWORK=pytorch pip install --no-build-isolation -c requirements/ci.txt -e '.[te]'
CMD ["python", "-m", "kernels.selftest"]
