# docker build -t diffcps .                               for CPUs
# docker build -t diffcps --build-arg TORCH=cu130 .       for CUDA 13.0 (or another of PyTorch's indexes)
# See docs/clusters.md.
FROM python:3.12-slim

# git names the commit in config.json, the compiler is torch.compile's, the rest draws films without a screen.
RUN apt-get update \
  && apt-get install -y --no-install-recommends git g++ libegl1 libgl1 libosmesa6 \
  && rm -rf /var/lib/apt/lists/*

WORKDIR /diffcps
ARG TORCH=cpu
COPY requirements.txt requirements.lock ./
# The locked versions; the libraries of CUDA are those that this build of torch brings.
RUN grep -Ev '^(nvidia|cuda|triton)' requirements.lock > /tmp/versions \
  && pip install --no-cache-dir "$(grep '^torch==' /tmp/versions)" --index-url "https://download.pytorch.org/whl/$TORCH" \
  && pip install --no-cache-dir -c /tmp/versions -r requirements.txt

COPY . .
RUN git config --global --add safe.directory /diffcps
ENTRYPOINT ["python"]
CMD ["run.py", "--help"]
