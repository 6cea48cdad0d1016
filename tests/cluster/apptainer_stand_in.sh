#!/bin/bash
# What `apptainer exec --nv --bind DIR[,DIR...] --pwd DIR IMAGE COMMAND...` does, for a host without Apptainer: the command
# sees the image, the host's /proc, /dev and /sys, and what is bound; Apptainer binds the host's /tmp and home as well, on
# which the template must not depend. IMAGE is a directory here, and a line of its file `binds` stands for each folder
# that it has.
set -euo pipefail

[[ $1 == exec && $2 == --nv && $3 == --bind && $5 == --pwd ]] || { echo "apptainer: unknown options: $*" >&2; exit 255; }
binds=$4 directory=$6 image=$7
shift 7
if [[ -z ${INSIDE:-} ]]; then
  INSIDE=1 exec unshare --mount "$0" exec --nv --bind "$binds" --pwd "$directory" "$image" "$@"
fi
root=/mnt
mount -t tmpfs image "$root"
mapfile -t folders <"$image/binds"
IFS=, read -ra bound <<<"$binds"
mkdir -m 1777 "$root/tmp"
for folder in /proc /dev /sys "${folders[@]}" "${bound[@]}"; do
  mkdir -p "$root$folder"
  mount --rbind "$folder" "$root$folder"
done
exec chroot "$root" env --chdir="$directory" "$@"
