#!/usr/bin/env bash
# A real two-node SLURM on one machine, for trying batch scripts where there is no cluster.
#
#   local_cluster.sh start     munged, one slurmctld and two slurmd (nodes n1 and n2); prints the
#                              line that points sbatch, srun and squeue at them
#   local_cluster.sh status    nodes and jobs
#   local_cluster.sh stop      cancels the jobs, ends the daemons, removes all they wrote
#
# Needs root and Debian's or Ubuntu's packages: apt-get install slurm-wlm munge. systemd is not
# needed, and a SLURM or munge that is installed for real is neither used nor changed: daemons,
# key and sockets are this script's own, in a directory of their own.
#
# Settings, from the environment:
#   SALT_SLURM_DIR   where everything is kept   (default: salt-slurm in $TMPDIR or /tmp)
#   SALT_SLURM_PORT  first of three TCP ports   (default: 16817)
#   SALT_SLURM_CPUS  CPUs that each node says it has; it may exceed the machine's (default: 8)
set -euo pipefail

PATH=$PATH:/usr/sbin:/sbin
DIR=${SALT_SLURM_DIR:-${TMPDIR:-/tmp}/salt-slurm}
PORT=${SALT_SLURM_PORT:-16817}
CPUS=${SALT_SLURM_CPUS:-8}
NODES=(n1 n2)
export SLURM_CONF=$DIR/slurm.conf

die() {
    echo "local_cluster.sh: $*" >&2
    exit 1
}

# Whether the daemon with pid file $1 runs; one that has ended but was not yet reaped does not.
runs() {
    local pid
    pid=$(cat "$1" 2>/dev/null) && [[ -n $pid && $(ps -o stat= -p "$pid") == [^Z]* ]]
}

# Waits up to $1 seconds for a command to succeed.
wait_for() {
    local deadline=$((SECONDS + $1))
    shift
    until "$@"; do
        ((SECONDS < deadline)) || return 1
        sleep 0.2
    done
}

port_is_free() { ! (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null; }
# "idle*" would be a node that has not answered yet.
nodes_are_idle() {
    [[ $(sinfo --noheader --Node --format=%t 2>/dev/null | grep -cx idle) -eq ${#NODES[@]} ]]
}
no_jobs() { [[ -z $(squeue --noheader 2>/dev/null) ]]; }
daemons_ended() {
    local file
    for file in "$DIR"/*.pid; do
        runs "$file" && return 1
    done
    return 0
}

write_conf() {
    local host
    host=$(hostname -s)
    cat >"$SLURM_CONF" <<CONF
ClusterName=salt
SlurmctldHost=$host(127.0.0.1)
SlurmUser=root
SlurmdUser=root
SlurmctldPort=$PORT
AuthType=auth/munge
AuthInfo=socket=$DIR/munge.socket
CredType=cred/munge
StateSaveLocation=$DIR/state
SlurmdSpoolDir=$DIR/spool-%n
SlurmctldPidFile=$DIR/slurmctld.pid
SlurmdPidFile=$DIR/slurmd-%n.pid
SlurmctldLogFile=$DIR/slurmctld.log
SlurmdLogFile=$DIR/slurmd-%n.log
# No cgroups: a container or a machine without systemd often cannot give them away.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
MailProg=/bin/true
MpiDefault=none
ReturnToService=2
# A node has as many CPUs as said below, whatever the machine has.
SlurmdParameters=config_overrides
NodeName=n1 NodeHostname=$host NodeAddr=127.0.0.1 Port=$((PORT + 1)) CPUs=$CPUS State=UNKNOWN
NodeName=n2 NodeHostname=$host NodeAddr=127.0.0.1 Port=$((PORT + 2)) CPUs=$CPUS State=UNKNOWN
PartitionName=local Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
CONF
}

start() {
    local program node
    [[ $(id -u) -eq 0 ]] || die "slurmd starts jobs for other users and needs root."
    for program in munged mungekey slurmctld slurmd sbatch; do
        command -v "$program" >/dev/null ||
            die "$program not found. Install SLURM: apt-get install slurm-wlm munge"
    done
    [[ ! -e $DIR ]] || die "$DIR exists: it runs already (status), or a start failed (stop first)."
    for node in 0 1 2; do
        port_is_free $((PORT + node)) ||
            die "port $((PORT + node)) is taken. Choose three free ones: SALT_SLURM_PORT=…"
    done
    mkdir -p "$DIR/state" "$DIR/spool-n1" "$DIR/spool-n2"
    chmod 755 "$DIR"
    write_conf
    trap 'echo "local_cluster.sh: start failed; the logs are in $DIR, stop removes them" >&2' ERR

    mungekey --create --keyfile="$DIR/munge.key"
    # --force: the socket may lie in a directory, such as /tmp, where others may write too.
    munged --force --key-file="$DIR/munge.key" --socket="$DIR/munge.socket" \
        --pid-file="$DIR/munged.pid" --log-file="$DIR/munged.log" --seed-file="$DIR/munge.seed" \
        2>"$DIR/munged.err"
    slurmctld -c
    for node in "${NODES[@]}"; do
        slurmd -N "$node"
    done
    wait_for 30 nodes_are_idle
    echo "Nodes ${NODES[*]} are up. In every shell that uses them:" >&2
    echo "export SLURM_CONF=$SLURM_CONF"
}

status() {
    [[ -e $SLURM_CONF ]] || die "not started."
    sinfo --Node --long
    squeue
}

stop() {
    local file
    [[ -e $DIR ]] || { echo "Nothing to stop." >&2 && return; }
    if runs "$DIR/slurmctld.pid"; then
        squeue --noheader --format=%i | xargs --no-run-if-empty scancel || true
        wait_for 45 no_jobs || echo "Some jobs did not end; ending the daemons all the same." >&2
    fi
    for file in "$DIR"/slurmd-*.pid "$DIR/slurmctld.pid" "$DIR/munged.pid"; do
        if runs "$file"; then kill "$(cat "$file")"; fi
    done
    wait_for 30 daemons_ended || die "a daemon does not end; its pid file is in $DIR."
    rm -rf "$DIR"
    echo "Stopped; nothing is left." >&2
}

case ${1:-} in
start | status | stop) "$1" ;;
*)
    echo "usage: local_cluster.sh start|status|stop" >&2
    exit 2
    ;;
esac
