#!/usr/bin/env bash
# Builds the container image of the serve role: deploy/image.sh [TAG], default rsm-serve:latest.
#
# With a Docker engine it runs docker build. Without one it runs buildah, which needs root and the Debian packages
# buildah and debootstrap, but no privilege beyond chroot. buildah needs no image registry: debootstrap makes the
# base image once, unless BASE_IMAGE names another one.
#
# Environment: BASE_IMAGE (see the Dockerfile), DEBIAN_MIRROR, STORAGE (buildah's folder, default .image).
# pip's index and certificate settings of this machine are used during the build and are not kept in the image.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
tag=${1:-rsm-serve:latest}
secrets=$(mktemp -d)
trap 'rm -rf "$secrets"' EXIT

# pip's settings for its index, used inside the build; this machine's folders do not exist there.
pip_settings() {
    local name value
    echo "[global]"
    for name in index-url trusted-host proxy timeout; do
        value=$(sed -nE "s/^[^=]*\.(default-)?$name='(.*)'\$/\2/p" <<<"$1" | head -n 1)
        [ -z "$value" ] || echo "$name = $value"
    done
    [ ! -s "$secrets/ca" ] || echo "cert = /etc/pip-ca.pem"
}

cat "${PIP_CERT:-/dev/null}" >"$secrets/ca"
pip_settings "$("${PYTHON:-python3}" -m pip config list)" >"$secrets/pip_conf"
build=(--target serve --tag "$tag" --secret "id=pip_conf,src=$secrets/pip_conf" --secret "id=ca,src=$secrets/ca")

if docker info >/dev/null 2>&1; then
    [ -z "${BASE_IMAGE:-}" ] || build+=(--build-arg "BASE_IMAGE=$BASE_IMAGE")
    DOCKER_BUILDKIT=1 docker build "${build[@]}" .
    exit
fi

for tool in buildah debootstrap; do
    command -v "$tool" >/dev/null || {
        echo "make image: no Docker engine answers, and $tool is missing; on Debian: apt-get install buildah debootstrap" >&2
        exit 2
    }
done
[ "$(id -u)" = 0 ] || { echo "make image: buildah with chroot isolation needs root; run it as root" >&2; exit 2; }

storage=$(realpath -m "${STORAGE:-.image}")
# vfs and chroot work without overlay mounts, namespaces or a daemon.
export BUILDAH_ISOLATION=chroot
buildah=(buildah --storage-driver vfs --root "$storage/root" --runroot "$storage/run")

if [ -z "${BASE_IMAGE:-}" ]; then
    BASE_IMAGE=localhost/rsm-base:bookworm
    if ! "${buildah[@]}" inspect --type image "$BASE_IMAGE" >/dev/null 2>&1; then
        rm -rf "$storage/debian"
        debootstrap --variant=minbase --include=python3-minimal,python3-venv bookworm "$storage/debian" \
            ${DEBIAN_MIRROR:+"$DEBIAN_MIRROR"}
        rm -rf "$storage"/debian/var/{cache/apt,lib/apt/lists}/* "$storage"/debian/usr/share/{doc,man,locale}/*
        container=$("${buildah[@]}" from scratch)
        "${buildah[@]}" add --quiet "$container" "$storage/debian" / >/dev/null
        "${buildah[@]}" commit --quiet --rm "$container" "$BASE_IMAGE" >/dev/null
        rm -rf "$storage/debian"
    fi
fi
# Docker's format: the OCI format has no health check.
"${buildah[@]}" build --format docker --network host --build-arg "BASE_IMAGE=$BASE_IMAGE" "${build[@]}" .
"${buildah[@]}" rmi --prune >/dev/null # the image that had this tag before
"${buildah[@]}" images
