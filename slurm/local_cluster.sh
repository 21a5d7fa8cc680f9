#!/usr/bin/env bash
# A real two-node SLURM (n0, n1; two CPUs each) on this machine, to test and to learn on: munged, slurmctld and two slurmd.
# All it writes lies in one folder, its daemons listen on loopback only, and it shares nothing with an installed SLURM.
# (srun outside a job listens, while it runs, on the address of the machine's name, where that is not loopback.)
#
#   slurm/local_cluster.sh up|down|status       start (twice is fine), stop and leave no process, look
#   eval "$(slurm/local_cluster.sh env)"        point sbatch, srun, squeue, ... of this shell at it
#
# LOCAL_CLUSTER_DIR: its folder (default /tmp/megadsl-slurm-UID). LOCAL_CLUSTER_PORT: first of three ports (default 16817).
set -euo pipefail
umask 022                                    # munge's socket must be reachable by the processes of a job
PATH=$PATH:/usr/sbin:/sbin                   # Debian keeps the daemons there, outside a user's PATH

dir=$(realpath -m "${LOCAL_CLUSTER_DIR:-/tmp/megadsl-slurm-$(id -u)}")
port=${LOCAL_CLUSTER_PORT:-16817}
export SLURM_CONF=$dir/slurm.conf

die() { echo "local_cluster.sh: $1" >&2; exit "${2:-1}"; }

check_packages() {
    local missing=()
    command -v munged >/dev/null || missing+=(munge)
    { command -v slurmctld && command -v slurmd && command -v sbatch; } >/dev/null || missing+=(slurm-wlm)
    [ ${#missing[@]} = 0 ] || die "missing Debian packages: ${missing[*]}. Install them with: apt-get install -y ${missing[*]}" 2
}

# With No(Ctld)InAddrAny SLURM listens on the address of the machine's own name. Where that is not loopback the daemons
# get the name localhost, in a UTS namespace of their own.
own_name() {
    case $(getent ahostsv4 "$(hostname)" | awk 'NR == 1 {print $1}') in
        127.*) hostname -s ;;
        *) echo localhost ;;
    esac
}

daemon() {
    if [ "$(own_name)" = "$(hostname -s)" ]; then "$@"; return; fi
    unshare --uts sh -c 'hostname localhost && exec "$@"' daemon "$@" ||
        die "the name $(hostname) is not on loopback and this user may not rename the daemons' machine; add '127.0.1.1 $(hostname)' to /etc/hosts"
}

write_config() {
    local user memory
    user=$(id -un)
    memory=$(awk '/^MemTotal/ {print int($2 / 2048)}' /proc/meminfo)     # MiB; half the machine's for each node
    cat > "$SLURM_CONF" <<CONF
# Written by slurm/local_cluster.sh.
ClusterName=local
SlurmctldHost=$(own_name)(127.0.0.1)
SlurmctldPort=$port
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
SlurmUser=$user
SlurmdUser=$user
AuthType=auth/munge
CredType=cred/munge
# A requeued job waits until credentials of its former life have expired: not two minutes here.
AuthInfo=socket=$dir/munge.socket,cred_expire=20
StateSaveLocation=$dir/state
SlurmctldPidFile=$dir/slurmctld.pid
SlurmctldLogFile=$dir/log/slurmctld.log
SlurmdPidFile=$dir/%n.pid
SlurmdSpoolDir=$dir/spool-%n
SlurmdLogFile=$dir/log/%n.log
# No control groups: this also has to run in a container.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SwitchType=switch/none
ReturnToService=2
KillWait=5
SchedulerParameters=sched_interval=2
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
# Both nodes claim two CPUs, whatever the machine has, so that two jobs of one CPU a node run side by side.
SlurmdParameters=config_overrides
NodeName=n0 NodeHostname=$(own_name) NodeAddr=127.0.0.1 Port=$((port + 1)) CPUs=2 RealMemory=$memory
NodeName=n1 NodeHostname=$(own_name) NodeAddr=127.0.0.1 Port=$((port + 2)) CPUs=2 RealMemory=$memory
PartitionName=local Nodes=n0,n1 Default=YES MaxTime=INFINITE State=UP
CONF
}

# By its command line: the number alone may belong to another process by now, or to one that is dead but not yet buried.
alive() { [ -s "$dir/$1.pid" ] && grep -q -s -F "$dir/" "/proc/$(cat "$dir/$1.pid")/cmdline"; }

idle_nodes() { sinfo --noheader --Node --format=%T 2>/dev/null | grep -c -E '^(idle|mixed|allocated)$' || true; }

up() {
    check_packages
    mkdir -p "$dir"/{log,state,spool-n0,spool-n1}
    [ -O "$dir" ] || die "$dir belongs to someone else; set LOCAL_CLUSTER_DIR."
    [ ${#dir} -le 80 ] || die "$dir is too long for a socket's name; set LOCAL_CLUSTER_DIR to a shorter folder."
    # A running daemon keeps the config it was started with.
    alive slurmctld || write_config
    if ! alive munged; then
        (umask 077; [ -s "$dir/munge.key" ] || head -c 1024 /dev/urandom > "$dir/munge.key")
        # --force: munge would refuse a folder below one that others may write to, as /tmp is. The key is ours alone.
        munged --force --key-file="$dir/munge.key" --socket="$dir/munge.socket" --pid-file="$dir/munged.pid" \
            --log-file="$dir/log/munged.log" --seed-file="$dir/munge.seed" 2>>"$dir/log/munged.start"
    fi
    alive slurmctld || daemon slurmctld -f "$SLURM_CONF"
    for node in n0 n1; do
        alive "$node" || daemon slurmd -N "$node" -f "$SLURM_CONF"
    done
    for _ in $(seq 60); do
        [ "$(idle_nodes)" = 2 ] && break
        sleep 0.5
    done
    [ "$(idle_nodes)" = 2 ] || die "the nodes did not come up in 30 s; see $dir/log."
    status
    echo "Now run: eval \"\$(${BASH_SOURCE[0]} env)\""
}

# Steps outlive their slurmd; ours are those that hold a file of our folder open.
steps() {
    local process
    for process in $(pgrep '^slurmstepd' || true); do
        [ -n "$(find "/proc/$process/fd" -lname "$dir/*" -print -quit 2>/dev/null)" ] && echo "$process"
    done
    return 0
}

down() {
    if alive slurmctld; then
        scancel --partition=local || true
        for _ in $(seq 40); do
            [ -z "$(squeue --noheader 2>/dev/null)$(steps)" ] && break
            sleep 0.5
        done
    fi
    local left name
    left=$(steps)
    for name in $left; do
        pkill -KILL -P "$name" || true
        kill -KILL "$name" 2>/dev/null || true
    done
    for name in n1 n0 slurmctld munged; do
        alive "$name" || continue
        kill "$(cat "$dir/$name.pid")"
        for _ in $(seq 50); do alive "$name" || break; sleep 0.1; done
        ! alive "$name" || kill -KILL "$(cat "$dir/$name.pid")"
        rm -f "$dir/$name.pid"
    done
    # Jobs of a former life would start again at the next `up`; the logs stay.
    rm -rf "$dir"/{state,spool-n0,spool-n1,munge.key,munge.seed}
    echo "local SLURM is down; its logs are in $dir/log"
}

status() {
    local name running=0
    for name in munged slurmctld n0 n1; do
        if alive "$name"; then running=$((running + 1)); else echo "$name is not running"; fi
    done
    [ $running = 4 ] || return 1
    sinfo --Node --format='%N %T %C (CPUs allocated/idle/other/total)' --noheader
    squeue
}

case ${1:-} in
    up|down|status) "$1" ;;
    env) echo "export SLURM_CONF=$(printf %q "$SLURM_CONF")" ;;
    *) die "say up, down, status or env" 2 ;;
esac
