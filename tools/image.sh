#!/usr/bin/env bash
# Builds the Dockerfile as it stands and tries what docs/docker.md says of the image: with buildah and podman, on a base made
# on this machine where no registry of images is at hand. Debian and Ubuntu: apt-get install buildah podman crun debootstrap.
#
#   tools/image.sh base       a Debian with its Python (debootstrap), as the image localhost/m2helpers-base
#   tools/image.sh build      the image; BASE=python:3.12-slim takes another base, WHEELS=DIR packages from a folder first
#   tools/image.sh check      size, user, token, folder of the host, health, read-only root, stop; writes tools' figures to docs/trust.json
#   tools/image.sh test       pytest inside
#   tools/image.sh sbom       docs/sbom.cdx.json, what is in the image (needs cyclonedx-py: pip install cyclonedx-bom)
#
# As root, or where buildah may make user namespaces. STORAGE='--storage-driver vfs' suits a disk without overlays; FLAGS are
# given to every podman run ('--ulimit nofile=1024:1024', say, where it may not raise that limit).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
BASE=${BASE:-localhost/m2helpers-base} IMAGE=${IMAGE:-localhost/m2helpers} SUITE=${SUITE:-bookworm}
PORT=${PORT:-8888} WHEELS=${WHEELS:-} TORCH_INDEX=${TORCH_INDEX-https://download.pytorch.org/whl/cpu}
ISOLATION=${ISOLATION:-chroot} NETWORK=${NETWORK:-host}
read -ra STORE <<<"${STORAGE:-}"
read -ra RUN <<<"${FLAGS:-}"
build=(buildah "${STORE[@]}") pod=(podman "${STORE[@]}")
own=$(id -u) name=m2helpers-check-$$

base() {
  local root
  root=$(mktemp -d)
  trap 'rm -rf "$root"' RETURN
  debootstrap --variant=minbase --include=python3,python3-venv,ca-certificates "$SUITE" "$root" >&2
  rm -rf "$root"/var/cache/apt/archives/*.deb "$root"/var/lib/apt/lists/* "$root"/usr/share/{doc,man,locale}
  local made
  made=$("${build[@]}" from scratch)
  "${build[@]}" add --quiet "$made" "$root" / >/dev/null
  "${build[@]}" commit --quiet --rm "$made" "$BASE"
}

image() {
  local more=()
  if [ -n "$WHEELS" ]; then
    more+=(--volume "$WHEELS:/wheels:ro" --volume /etc/ssl/certs:/etc/ssl/certs:ro)
    more+=(--env PIP_FIND_LINKS=/wheels --env PIP_CERT=/etc/ssl/certs/ca-certificates.crt)
  fi
  "${build[@]}" bud --format docker --layers --isolation "$ISOLATION" --network host "${more[@]}" \
    --build-arg "BASE=$BASE" --build-arg "TORCH_INDEX=$TORCH_INDEX" -t "$IMAGE" .
}

# The server in the background; its token goes to the standard output once it answers.
serve() {
  "${pod[@]}" run --detach --rm "${RUN[@]}" --network "$NETWORK" --name "$name" "$@" >/dev/null
  local tries
  for tries in $(seq 120); do
    if curl -fs "http://127.0.0.1:$PORT/api" >/dev/null; then
      "${pod[@]}" logs "$name" 2>&1 | grep -o 'token=[0-9a-f]*' | head -1 | cut -d= -f2
      return
    fi
    sleep 1
  done
  "${pod[@]}" logs "$name" >&2
  return 1
}

status() { curl -s -o /dev/null -w '%{http_code}' "$@"; }

check() {
  local bytes token url=http://127.0.0.1:$PORT/api/contents folder seconds
  bytes=$("${pod[@]}" image inspect --format '{{.Size}}' "$IMAGE")
  ((bytes < 2400000000)) || { echo "the image has $bytes bytes" >&2; exit 1; }
  [ "$("${pod[@]}" run --rm "${RUN[@]}" --network "$NETWORK" "$IMAGE" id -u)" != 0 ]
  "${pod[@]}" image inspect "$IMAGE" | grep -q org.opencontainers.image.licenses
  "${pod[@]}" image inspect "$IMAGE" | grep -qi healthcheck

  token=$(serve "$IMAGE")
  [ "$(status "$url")" = 403 ] && [ "$(status "$url?token=0$token")" = 403 ] && [ "$(status "$url?token=$token")" = 200 ]
  "${pod[@]}" healthcheck run "$name"
  seconds=$(date +%s.%N)
  "${pod[@]}" stop --time 60 "$name" >/dev/null
  seconds=$(python3 -c "import time; print(round(time.time() - $seconds, 1))")

  # A folder of the host's user, the root read-only: a notebook is opened and saved, and stays when the container is gone.
  folder=$(mktemp -d)
  cp notebooks/1_*.ipynb "$folder"
  [ "$own" != 0 ] || { own=12345 && chown -R "$own" "$folder"; }
  token=$(serve --read-only --tmpfs /tmp:mode=1777 --user "$own" -e HOME=/tmp -e M2_LEDGER=/tmp/ledger.sqlite \
    -v "$folder:/home/student/m2helpers/notebooks" "$IMAGE")
  curl -fs "$url/notebooks/$(basename "$folder"/1_*)?token=$token" | python3 -c 'import json, sys; assert json.load(sys.stdin)["writable"]'
  curl -fs -X PUT -H "Authorization: token $token" -d '{"type": "file", "format": "text", "content": "kept"}' "$url/notebooks/new.txt" >/dev/null
  "${pod[@]}" exec "$name" python -m m2helpers flops --train >/dev/null
  "${pod[@]}" stop --time 60 "$name" >/dev/null
  [ "$(cat "$folder/new.txt")" = kept ] && [ "$(stat -c %u "$folder/new.txt")" = "$own" ]
  rm -r "$folder"
  python3 - "$bytes" "$seconds" "$("${build[@]}" --version)" <<'PY'
import json, pathlib, sys
from datetime import date
path = pathlib.Path("docs/trust.json")
known = json.loads(path.read_text()) if path.exists() else {}
known["image"] = {**known.get("image", {}), "date": date.today().isoformat(), "bytes": int(sys.argv[1]), "stop_seconds": float(sys.argv[2]), "with": sys.argv[3]}
path.write_text(json.dumps(dict(sorted(known.items())), indent=1) + "\n")
PY
  echo "$IMAGE: $bytes bytes; stopped in $seconds s"
}

case ${1:-} in
  base) base ;;
  build) image ;;
  check) check ;;
  test) "${pod[@]}" run --rm "${RUN[@]}" --network "$NETWORK" "$IMAGE" python -m pytest -q "${@:2}" tests ;;
  sbom) "${pod[@]}" run --rm "${RUN[@]}" --network "$NETWORK" "$IMAGE" pip freeze --exclude-editable | cyclonedx-py requirements - --output-reproducible --of JSON -o docs/sbom.cdx.json ;;
  *) sed -n '2,13s/^# \?//p' "$0" >&2; exit 2 ;;
esac
