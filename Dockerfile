# Once:                   docker build --tag icm .
# Trains by default:      mkdir -p runs && docker run -v "$PWD/runs:/app/runs" icm
#                         (writes as user 1000: where you are another, chown 1000 runs;
#                         with --gpus all on the GPU; on x86-64 faster with scripts/train.py env.emulator=libretro)
# Anything else as well:  docker run -v "$PWD/runs:/app/runs" icm scripts/play.py ckpt=checkpoints/1-1.pt out=runs/1-1.mp4
# A Ray cluster:          deploy/ray-compose.yaml
#
# The PyTorch wheel brings its own CUDA libraries; for --gpus the host needs the NVIDIA driver and its
# container toolkit.
FROM python:3.13-slim

# nes-py is built from C++ where no wheel fits the platform
RUN apt-get update \
    && apt-get install --yes --no-install-recommends build-essential \
    && rm -rf /var/lib/apt/lists/*

RUN useradd --create-home --uid 1000 icm && mkdir -p /app/runs && chown -R icm:icm /app
WORKDIR /app

# dependencies first: they change less often than the code
COPY --chown=icm:icm pyproject.toml README.md LICENSE ./
# of the package, such as [fast,ray]
ARG EXTRAS=[fast]
# uv reads in pyproject.toml which version of pyglet is right for nes-py and stable-retro
RUN pip install --no-cache-dir uv && mkdir icm && touch icm/__init__.py \
    && uv pip install --system --no-cache --editable ".$EXTRAS" && rm -r icm
COPY --chown=icm:icm icm ./icm
COPY --chown=icm:icm conf ./conf
COPY --chown=icm:icm scripts ./scripts
COPY --chown=icm:icm checkpoints ./checkpoints

USER icm
ENV PYTHONUNBUFFERED=1
VOLUME /app/runs
ENTRYPOINT ["python"]
CMD ["scripts/train.py"]
