#!/usr/bin/env bash
# Run a command inside a throw-away Slurm cluster:
#
#     tests/helpers/slurm/with_slurm.sh NUM_NODES COMMAND [ARGUMENT...]
#
# The controller, its nodes and their jobs live in network, mount, host-name and process namespaces
# of their own. So no port or name can clash, nothing outside is touched, and the kernel ends
# everything when COMMAND ends. The exit code is COMMAND's; 77 where this is not root, 1 where the
# cluster did not come up. The outer `unshare` ignores SIGTERM: bound it with `timeout -s KILL`.
#
# COMMAND finds the cluster through SLURM_CONF. Logs and state are in $SLURM_TEST_ROOT: set it to keep
# them (in a short path: the munge socket's may have 107 characters). `node.sh down 1` and
# `node.sh up 1`, beside this file, cut the power of a node and bring it back; the controller takes
# it for lost after $SLURM_TEST_LOST_AFTER_S seconds (120).
set -euo pipefail

if [ "$(id -u)" != 0 ]; then
  echo "with_slurm.sh: needs root, which slurmctld and the namespaces ask for" >&2
  exit 77
fi
if [ $# -lt 2 ]; then
  echo "usage: with_slurm.sh NUM_NODES COMMAND [ARGUMENT...]" >&2
  exit 2
fi

# Start again inside the namespaces; --kill-child ends them with this process.
if [ -z "${SLURM_TEST_INSIDE:-}" ]; then
  export SLURM_TEST_INSIDE=1
  if [ -n "${SLURM_TEST_ROOT:-}" ]; then
    exec unshare --net --mount --uts --pid --fork --kill-child --mount-proc "$0" "$@"
  fi
  SLURM_TEST_ROOT=$(mktemp -d "${TMPDIR:-/tmp}/slurm.XXXXXX")
  export SLURM_TEST_ROOT
  trap 'rm -rf "$SLURM_TEST_ROOT"' EXIT
  unshare --net --mount --uts --pid --fork --kill-child --mount-proc "$0" "$@"
  exit
fi

num_nodes=$1
shift
here=$(cd "$(dirname "$0")" && pwd)
export SLURM_CONF=$SLURM_TEST_ROOT/slurm.conf
mkdir -p "$SLURM_TEST_ROOT"/{state,log,munge,run}

start_network() {
  hostname ctl
  ip link set lo up
  ip link add br0 type bridge
  ip addr add 10.213.7.254/24 dev br0
  ip link set br0 up
  {
    echo "127.0.0.1 localhost"
    echo "10.213.7.254 ctl"
    for ((i = 0; i < num_nodes; i++)); do echo "10.213.7.$((i + 1)) n$i"; done
  } >"$SLURM_TEST_ROOT/hosts"
  mount --bind "$SLURM_TEST_ROOT/hosts" /etc/hosts
}

start_munge() {
  local folder=$SLURM_TEST_ROOT/munge
  (umask 077 && head -c 128 /dev/urandom >"$folder/key")
  # --force: folders above ours may be closed to other users, which munged takes for a mistake.
  munged --force --socket="$folder/socket" --key-file="$folder/key" --pid-file="$folder/pid" \
    --seed-file="$folder/seed" --log-file="$folder/log" 2>/dev/null
}

# cred_expire is also how long a requeued job waits before it may start again: 120 s by default,
# 5 s at least. No accounting and no cgroups: state comes from `scontrol show job`.
write_slurm_conf() {
  cat >"$SLURM_CONF" <<CONF
ClusterName=test
SlurmctldHost=ctl
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$SLURM_TEST_ROOT/munge/socket,cred_expire=5
CredType=cred/munge
StateSaveLocation=$SLURM_TEST_ROOT/state
SlurmctldPidFile=$SLURM_TEST_ROOT/run/slurmctld.pid
SlurmctldLogFile=$SLURM_TEST_ROOT/log/slurmctld.log
SlurmdPidFile=$SLURM_TEST_ROOT/run/slurmd.%n.pid
SlurmdSpoolDir=$SLURM_TEST_ROOT/run/spool.%n
SlurmdLogFile=$SLURM_TEST_ROOT/log/slurmd.%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0,sched_min_interval=0
SlurmdTimeout=${SLURM_TEST_LOST_AFTER_S:-120}
SlurmctldTimeout=120
MessageTimeout=100
BatchStartTimeout=600
InactiveLimit=0
KillWait=5
MinJobAge=3600
ReturnToService=2
MailProg=/bin/true
NodeName=n[0-$((num_nodes - 1))] CPUs=2 RealMemory=4000 State=UNKNOWN
PartitionName=test Nodes=ALL Default=YES MaxTime=INFINITE State=UP
CONF
}

wait_until_idle() {
  local idle=0
  while kill -0 "$controller" 2>/dev/null; do
    idle=$(sinfo --noheader --Node --states=idle --format=%N 2>/dev/null | wc -l) || idle=0
    [ "$idle" = "$num_nodes" ] && return
    sleep 0.1
  done
  echo "with_slurm.sh: $idle of $num_nodes nodes came up" >&2
  tail -n 20 "$SLURM_TEST_ROOT"/log/* >&2
  exit 1
}

start_network
start_munge
write_slurm_conf
slurmctld -D >"$SLURM_TEST_ROOT/log/slurmctld.out" 2>&1 &
controller=$!
for ((i = 0; i < num_nodes; i++)); do "$here/node.sh" up "$i"; done
wait_until_idle

# Not exec: when this shell, process 1 of the namespace, ends, the kernel ends all the others.
status=0
"$@" || status=$?
exit "$status"
