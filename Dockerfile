# JupyterLab on port 8888 with everything the notebooks need. It asks for the token that it prints when it starts.
#
#   docker build -t m2helpers .
#   docker run --rm -p 127.0.0.1:8888:8888 m2helpers
#
# PyTorch is the CPU build. With --build-arg TORCH_INDEX= it is PyPI's, which brings CUDA, several GB, on any Linux.
# BASE may be any Debian or Ubuntu with Python 3.11 or newer, its venv module and useradd.
ARG BASE=python:3.12-slim
FROM ${BASE}

LABEL org.opencontainers.image.title="m2helpers" \
      org.opencontainers.image.description="Fine-tune a language model on numbers, and know what it cost" \
      org.opencontainers.image.licenses="MIT" \
      org.opencontainers.image.version="0.1.0"

RUN useradd --create-home --shell /bin/bash student
USER student
ENV HOME=/home/student \
    PATH=/home/student/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    OMP_WAIT_POLICY=PASSIVE \
    HF_HUB_DISABLE_TELEMETRY=1
# Another user number (docker run --user) may read and run what is here; what it writes goes to folders it is given.
RUN chmod 755 /home/student && mkdir /home/student/m2helpers && python3 -m venv /home/student/venv
WORKDIR /home/student/m2helpers

# The dependencies come first, so that a change in the project does not download them again. What nothing here reads is left
# out in the same step: the packages' own tests, PyTorch's C++ headers, and bytecode of what is never imported.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
COPY --chown=student:student requirements.txt constraints.txt ./
RUN pip install --no-cache-dir --no-compile ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} -c constraints.txt -r requirements.txt \
 && cd /home/student/venv/lib/python3*/site-packages \
 && rm -rf torch/include torch/test pyarrow/include \
 && find numpy pandas scipy sklearn statsmodels sympy numba -type d -name tests -prune -exec rm -rf {} + \
 && python -c "import accelerate, bitsandbytes, jupyterlab.labapp, matplotlib.pyplot, notebook_shim, peft, pytest, seaborn, statsmodels.api, transformers.models.qwen2.modeling_qwen2, transformers.trainer"

COPY --chown=student:student . .
RUN pip install --no-cache-dir --no-deps --no-build-isolation -e . \
 && python -m ipykernel install --sys-prefix --name m2helpers --display-name "Python 3 (m2helpers)" \
 && jupyter labextension disable --level=sys_prefix "@jupyterlab/apputils-extension:announcements"

EXPOSE 8888
# /api says the server's version, to anybody; all else wants the token.
HEALTHCHECK --interval=30s --timeout=10s --start-period=60s \
  CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8888/api', timeout=5)"]
CMD ["jupyter", "lab", "--ip=0.0.0.0", "--port=8888", "--no-browser", "--LabApp.default_url=/lab/tree/notebooks", \
     "--MappingKernelManager.shutdown_wait_time=2"]
