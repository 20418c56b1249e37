# JupyterLab on port 8888 with everything the notebooks need. It asks for the token that it prints when it starts.
#
#   docker build -t m2helpers --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cpu .
#   docker run --rm -p 8888:8888 m2helpers
#
# TORCH_INDEX is optional: PyTorch's own CPU index. Without it, PyPI's wheel brings CUDA, several GB, on any Linux.
FROM python:3.12-slim

RUN useradd --create-home --shell /bin/bash student
USER student
ENV HOME=/home/student \
    PATH=/home/student/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    OMP_WAIT_POLICY=PASSIVE \
    HF_HUB_DISABLE_TELEMETRY=1
# Another user number (docker run --user) may read and run what is here; what it writes goes to folders it is given.
RUN chmod 755 /home/student && mkdir /home/student/m2helpers && python -m venv /home/student/venv
WORKDIR /home/student/m2helpers

# The dependencies come first, so that a change in the project does not download them again.
ARG TORCH_INDEX=""
COPY --chown=student:student requirements.txt ./
RUN pip install --no-cache-dir ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} -r requirements.txt

COPY --chown=student:student . .
RUN pip install --no-cache-dir --no-deps --no-build-isolation -e . \
 && python -m ipykernel install --sys-prefix --name m2helpers --display-name "Python 3 (m2helpers)" \
 && jupyter labextension disable --level=sys_prefix "@jupyterlab/apputils-extension:announcements"

EXPOSE 8888
CMD ["jupyter", "lab", "--ip=0.0.0.0", "--port=8888", "--no-browser", "--LabApp.default_url=/lab/tree/notebooks"]
