#!/usr/bin/env bash
# Power of one node, for commands that run under with_slurm.sh:
#
#     node.sh up 0      start slurmd as host n0, in namespaces of its own, wired to the cluster's bridge
#     node.sh down 0    a power cut: the node's process 1 is killed, and the kernel ends the rest
set -euo pipefail

index=$2
run=$SLURM_TEST_ROOT/run
log=$SLURM_TEST_ROOT/log/slurmd.n$index.out
init_file=$run/n$index.init
wired_file=$run/n$index.wired

# Process 1 of the node: waits for its end of the cable, then is slurmd's parent.
be_the_node() {
  hostname "n$index"
  ip link set lo up
  while [ ! -e "$wired_file" ]; do sleep 0.02; done
  ip link set eth0 up
  ip addr add "10.213.7.$((index + 1))/24" dev eth0
  slurmd -D -N "n$index" &
  wait
}

# The process id, as seen from the cluster, of the one child that `unshare --fork` has.
wait_for_init() {
  local init=""
  for _ in $(seq 250); do
    init=$(pgrep -P "$1" | head -n 1 || true)
    if [ -n "$init" ] && [ "$(readlink "/proc/$init/ns/net")" != "$(readlink /proc/self/ns/net)" ]; then
      echo "$init"
      return
    fi
    sleep 0.02
  done
  echo "node.sh: node $index did not start; see $log" >&2
  exit 1
}

case $1 in
  up)
    mkdir -p "$run/spool.n$index"
    rm -f "$wired_file"
    unshare --net --uts --mount --pid --fork --kill-child --mount-proc \
      "$0" init "$index" </dev/null >>"$log" 2>&1 &
    wait_for_init $! >"$init_file"
    ip link delete "veth$index" 2>/dev/null || true # left from before a power cut
    ip link add "veth$index" type veth peer name eth0 netns "$(cat "$init_file")"
    ip link set "veth$index" master br0 up
    touch "$wired_file"
    ;;
  init) be_the_node ;;
  down) kill -KILL "$(cat "$init_file")" ;;
  *)
    echo "usage: node.sh up|down INDEX" >&2
    exit 2
    ;;
esac
