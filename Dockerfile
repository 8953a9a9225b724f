# The image of the plugin, for the engine's own architecture or another one:
#   docker build -t usbip-plugin .            buildah build -t usbip-plugin .
#   docker buildx build --platform linux/amd64,linux/arm64 -t usbip-plugin .
# Nothing is run in the final stage, and the builder runs on the build machine, so a foreign architecture needs no emulation.
#
# BASE      what the plugin runs on: glibc, libstdc++, python3 >= 3.11, nothing else; a digest of the index of all platforms.
#           docker buildx imagetools inspect BASE verifies that the official repository has it, and for which platforms.
# BUILDER   the same Python for the build machine; python3 alone will do if a wheel of pip is in wheels/
# PIP_*     as pip has them. Without an index: put all wheels, also those of image-build.lock, into wheels/, PIP_NO_INDEX=1
# SOURCE_DATE_EPOCH  seconds since 1970 for the times of the plugin's files and of the SBOM
# VERSION   the project's version, for the label; the build compares
ARG BASE=docker.io/library/python:3.13-slim@sha256:7c61056e61ac89e852de05f3dc6fa51a6dd2181797bceed46aa725dd7cb2cd3b
ARG BUILDER=${BASE}

FROM --platform=${BUILDPLATFORM:-linux/amd64} ${BUILDER} AS builder
ARG PIP_NO_INDEX=
ARG PIP_INDEX_URL=
ARG PIP_EXTRA_INDEX_URL=
ARG PIP_TRUSTED_HOST=
ENV PIP_FIND_LINKS=/build/wheels PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore \
    PIP_BREAK_SYSTEM_PACKAGES=1 PYTHONDONTWRITEBYTECODE=1
WORKDIR /build

# The standard library's bytecode for PYTHONOPTIMIZE=2: bases come without it, and would compile at each start. It is
# checked against the source it was made from, in case BASE and BUILDER have not quite the same Python.
RUN set -eu; stdlib=$(python3 -c 'import sysconfig; print(sysconfig.get_path("stdlib"))'); \
    mkdir -p bytecode; \
    python3 -m compileall -q -j 0 -o 2 --invalidation-mode checked-hash \
      -x '/(test|tests|idlelib|lib2to3|tkinter|turtledemo|ensurepip|distutils|pydoc_data|site-packages|dist-packages|config-[^/]*)/' "$stdlib"; \
    find "$stdlib" -name '*.opt-2.pyc' -not -path '*-packages/*' -print0 | tar --null -T - -cf - | tar -C bytecode -xf -

# wheels/ may be absent; the locks alone decide about this layer. The typed API and the models of
# kubernetes_asyncio (28 MB) are removed, because the plugin uses neither.
COPY image.lock image-build.lock wheels* ./wheels/
ARG TARGETARCH
ARG SOURCE_DATE_EPOCH=0
RUN set -eu; \
    if python3 -m pip --version >/dev/null 2>&1; then pip='-m pip'; \
    elif [ -e wheels/pip-*.whl ]; then pip="$(echo wheels/pip-*.whl)/pip"; \
    else echo "BUILDER has no pip: take one with pip, or put a wheel of pip into wheels/" >&2; exit 1; fi; \
    python3 $pip install --quiet --only-binary=:all: --require-hashes -r wheels/image-build.lock; \
    case "${TARGETARCH:-$(uname -m)}" in \
      amd64 | x86_64) machine=x86_64 ;; \
      arm64 | aarch64) machine=aarch64 ;; \
      *) echo "TARGETARCH: ${TARGETARCH:-$(uname -m)} is not built; amd64 and arm64 are" >&2; exit 1 ;; \
    esac; \
    platforms="--platform manylinux2014_$machine"; \
    for glibc in 17 24 26 27 28 31 34; do platforms="$platforms --platform manylinux_2_${glibc}_$machine"; done; \
    python3 -m pip install --quiet --no-compile --only-binary=:all: --require-hashes $platforms --target lib -r wheels/image.lock; \
    rm -rf lib/bin; \
    find lib -maxdepth 1 -type f -not -name '*.py' -not -name '*.so' -delete; \
    find lib -type d \( -name tests -o -name test -o -name testing \) -prune -exec rm -rf {} +; \
    find lib/kubernetes_asyncio/client/api lib/kubernetes_asyncio/client/models -name '*.py' -not -name __init__.py -delete; \
    find lib -type f \( -name '*.pyx' -o -name '*.pxd' -o -name '*.pxi' -o -name '*.pyi' -o -name '*.c' -o -name '*.h' \) -delete; \
    python3 -m compileall -q -j 0 -o 2 --invalidation-mode unchecked-hash -s /build -p /opt/usbip-plugin /build/lib; \
    find lib bytecode -exec touch -h -d "@$SOURCE_DATE_EPOCH" {} +

COPY release/sbom.py ./
COPY pyproject.toml README.md LICENSE ./source/
COPY usbip_plugin ./source/usbip_plugin
COPY usbip_sim ./source/usbip_sim
ARG VERSION=0.1.0
RUN set -eu; \
    python3 -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir own ./source; \
    python3 -m pip install --quiet --no-compile --no-deps --no-index --target project/lib own/*.whl; \
    mv project/lib/bin project/bin; \
    sed -i '1s|.*|#!/usr/bin/env python3|' project/bin/*; \
    python3 -m compileall -q -j 0 -o 2 --invalidation-mode unchecked-hash -s /build/project -p /opt/usbip-plugin /build/project/lib; \
    version=$(sed -n 's/^Version: //p' project/lib/usbip_plugin-*.dist-info/METADATA); \
    [ "$VERSION" = "$version" ] || { echo "VERSION: $VERSION is given, but the project has $version" >&2; exit 1; }; \
    python3 sbom.py lib project/lib >project/sbom.spdx.json; \
    find project -exec touch -h -d "@$SOURCE_DATE_EPOCH" {} +; \
    du -sk bytecode lib project >&2

FROM ${BASE}
ARG VERSION=0.1.0
# named here, too, so that no layer of another time is taken from a cache
ARG SOURCE_DATE_EPOCH=0
LABEL org.opencontainers.image.title="usbip-plugin" \
      org.opencontainers.image.description="USB/IP device plugin for Kubernetes, coordinated through Leases" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}"
# The bytecode beside the sources is all that is ever read; PYTHONOPTIMIZE names which
ENV PATH=/opt/usbip-plugin/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
    PYTHONPATH=/opt/usbip-plugin/lib PYTHONOPTIMIZE=2 PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
COPY --from=builder /build/bytecode/ /
COPY --from=builder /build/lib /opt/usbip-plugin/lib
COPY --from=builder /build/project /opt/usbip-plugin
WORKDIR /
# root without capabilities: the files of vhci_hcd and the kubelet's sockets belong to root
USER 0
ENTRYPOINT ["python3", "-m", "usbip_plugin"]
CMD ["--help"]
