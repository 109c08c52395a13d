#!/usr/bin/env bash
# Asks TF Serving what is in image files: client.sh URL MODEL FILE...
set -euo pipefail
url=$1 model=$2
shift 2

for file in "$@"; do
    [ -r "$file" ] || { echo "client.sh: there is no file $file" >&2; exit 2; }
done
instances=$(for file in "$@"; do printf '{"b64": "%s"}\n' "$(base64 <"$file" | tr -d '\n')"; done | paste -sd, -)
# By a pipe: an argument may have no more than 128 kB.
printf '{"signature_name": "image_bytes", "instances": [%s]}' "$instances" |
    curl --fail-with-body --silent --show-error --max-time 30 --data-binary @- "$url/v1/models/$model:predict"
