# One image for every process of EdgeKiln; docker-compose.yml says which command each container runs.

FROM python:3.11-slim-bookworm AS build
WORKDIR /build
RUN python -m venv /opt/edgekiln
ENV PATH=/opt/edgekiln/bin:$PATH \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1
# The CPU build of torch: the one on PyPI brings CUDA packages of several gigabytes.
ARG TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu
COPY requirements.lock pyproject.toml ./
# What the code imports, as pyproject.toml names it, at the versions of requirements.lock; no tools of tests.
RUN python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies'], sep='\n')" \
        > direct.txt \
    && pip install --no-deps --index-url "$TORCH_INDEX_URL" --constraint requirements.lock torch \
    && pip install --constraint requirements.lock --requirement direct.txt hatchling
# Last, so that a change of code makes this layer alone anew.
COPY README.md LICENSE ./
COPY migrations migrations
COPY service service
COPY workers workers
RUN pip install --no-deps --no-build-isolation .

FROM python:3.11-slim-bookworm
LABEL org.opencontainers.image.title="EdgeKiln" \
      org.opencontainers.image.licenses="Apache-2.0"
# A number, so that an orchestrator can see that it is not root. A new volume at /data takes this owner.
RUN groupadd --gid 10001 edgekiln \
    && useradd --uid 10001 --gid edgekiln --create-home --shell /usr/sbin/nologin edgekiln \
    && install --directory --owner=edgekiln --group=edgekiln --mode=700 /data
COPY --from=build /opt/edgekiln /opt/edgekiln
ENV PATH=/opt/edgekiln/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    EDGEKILN_DATA_DIR=/data
USER 10001:10001
# Not the data directory, and nothing that could be imported by mistake.
WORKDIR /home/edgekiln
CMD ["edgekiln", "--help"]
