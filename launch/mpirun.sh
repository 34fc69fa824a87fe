#!/usr/bin/env bash
# Start distinf ranks with whichever MPI launcher there is: print the full command on stderr, then exec it.
#
#   launch/mpirun.sh -n 2 [-ppn 1] [-f hostfiles/4x2.txt] [--mpirun PATH] [launcher options ...] -- generate ...
#
# After `--`: a sub-command of distinf, or `python ...`, or a program given with its path (./prog, /bin/hostname).
# Hostfile: one `host` or `host:ranks` a line, `#` lines are comments; without -ppn, -n is spread evenly over the hosts.
set -euo pipefail
trap 'exit 130' INT # which bash minds by itself only when the command that it waits for has died of it too
here=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")

die() {
    printf 'mpirun.sh: %s\n' "$1" >&2
    exit 2
}

find_tool() { # the first of the names "$@" in the repository's .venv, else the active environment, else on PATH
    local dir name
    for dir in "${here%/*}/.venv/bin" ${VIRTUAL_ENV:+"$VIRTUAL_ENV/bin"}; do
        for name; do [[ -x $dir/$name ]] && echo "$dir/$name" && return; done
    done
    for name; do type -P -- "$name" && return; done
    return 1
}

end_when_cut_off() { # PID of hydra's mpiexec: when the network to another host is cut, it waits for it for ever
    local over=0 started='' child state
    while ((over < 3)) && sleep 0.4 && started=$(cat "/proc/$1/task/$1/children"); do
        [[ -z $started ]] || over=$((over + 1)) # what it has started here is over, unless
        for child in $started; do
            state=$(sed 's/.*) //' "/proc/$child/stat") && [[ $state == Z* ]] || over=0
        done
    done
    ((over < 3)) || kill -KILL "$1" # it does not mind SIGTERM
}

n='' ppn='' hostfile='' launcher='' options=()
while (($#)) && [[ $1 != -- ]]; do
    case $1 in
        -n | -np | -ppn | -f | --mpirun) [[ ${2---} != -- ]] || die "$1 needs a value" ;;&
        -n | -np | -ppn) [[ $2 =~ ^[1-9][0-9]{0,5}$ ]] || die "$1 must be a positive number, got '$2'" ;;&
        -n | -np) n=$2 && shift 2 ;;
        -ppn) ppn=$2 && shift 2 ;;
        -f) hostfile=$2 && shift 2 ;;
        --mpirun) launcher=$(type -P -- "$2") || die "--mpirun $2: no such executable"; shift 2 ;;
        -h | --help) sed -n '2,7s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;;
        *) options+=("$1") && shift ;;
    esac
done
(($# > 1)) || die "nothing to run: put '--' and a command last, for example: -n 2 -- info"
shift
[[ -n $n ]] || die "-n is missing: say how many ranks to start"

# Where the ranks go. `most` is the largest number of ranks on one host, `counted` how many lines say `host:ranks`.
hosts=() names=' ' counted=0 room=$n most=${ppn:-$(((n - 1) / ${SLURM_JOB_NUM_NODES:-1} + 1))}
if [[ -n $hostfile ]]; then
    [[ -f $hostfile && -r $hostfile ]] || die "-f $hostfile: no such file"
    room=0 most=0
    while read -r line || [[ -n $line ]]; do
        [[ -z $line || $line == \#* ]] && continue
        [[ $line =~ ^([A-Za-z0-9._-]+)(:([1-9][0-9]{0,5}))?$ ]] ||
            die "-f $hostfile: expected 'host' or 'host:ranks', got '$line'"
        name=${BASH_REMATCH[1]} ranks=${BASH_REMATCH[3]}
        [[ $names != *" $name "* ]] || die "-f $hostfile: host '$name' is there twice, write '$name:2'"
        getent ahosts "$name" > /dev/null || die "-f $hostfile: unknown host '$name'"
        hosts+=("$line") names+="$name "
        [[ -n $ranks ]] || continue
        counted=$((counted + 1)) room=$((room + ranks)) most=$((ranks > most ? ranks : most))
    done < "$hostfile"
    ((${#hosts[@]})) || die "-f $hostfile: it names no host"
    ((counted == 0 || counted == ${#hosts[@]})) || die "-f $hostfile: give ':ranks' on every line or on none"
    [[ $counted == 0 || -z $ppn ]] || die "-ppn $ppn: $hostfile already says how many ranks each host gets"
    ((counted)) || most=${ppn:-$(((n - 1) / ${#hosts[@]} + 1))} room=$((most * ${#hosts[@]}))
    ((n <= room)) || die "-n $n: $hostfile${ppn:+ with -ppn $ppn} has room for $room ranks"
fi

# What to run. A bare word is distinf's, since `info` is also a program of most systems.
case $1 in
    python | python3) program=$(find_tool python python3) || die "python not found: run 'make venv'"; shift ;;
    */*) program=$(type -P -- "$1") || die "$1: no such executable"; shift ;;
    *) program=$(find_tool distinf) || die "distinf not found: run 'make venv' or activate its environment" ;;
esac

# Which launcher. Its folder goes first on PATH because the Intel wheel's mpirun looks there for mpiexec.hydra.
[[ -n $launcher ]] || launcher=$(find_tool mpirun mpiexec) ||
    die "no MPI launcher: run 'make venv' or give --mpirun PATH"
bin=$(cd "$(dirname "$launcher")" && pwd)
version=$(PATH=$bin:$PATH "$launcher" --version 2>&1 || true)
case $version in
    *"Intel(R) MPI"*) family=intel ;;
    *HYDRA* | *MPICH*) family=mpich ;;
    *"Open MPI"* | *OpenRTE*) family=openmpi ;;
    *) die "$launcher is not Intel MPI, MPICH or Open MPI: its --version says '${version%%$'\n'*}'" ;;
esac

start=("$launcher") place=()
case $family in
    intel | mpich)
        # Intel's -f ignores `host:ranks` and its -machinefile ignores -ppn; MPICH's -f takes both.
        flag=-f
        [[ $family$counted == intel0 || $family == mpich ]] || flag=-machinefile
        [[ -z $hostfile ]] || place+=("$flag" "$hostfile")
        [[ -z $ppn$hostfile || $counted != 0 ]] || place+=(-ppn "$most") ;;&
    intel)
        # Intel's mpirun is a shell script that, ended by SIGTERM, leaves the ranks running; mpiexec.hydra ends them.
        # The script stays where it has work: a batch system other than Slurm, or a vars.sh that was not sourced.
        if [[ -n ${PBS_ENVIRONMENT-}${PBS_NODEFILE-}${LSB_JOBID-}${PE_HOSTFILE-}${LOADL_HOSTFILE-} ||
            (-z ${I_MPI_ROOT-} && -f $bin/../env/vars.sh) || ! -x $bin/mpiexec.hydra ]]; then
            start=(env "PATH=$bin:$PATH" "$launcher")
        else
            start=("$bin/mpiexec.hydra")
        fi ;;
    openmpi)
        # It wants `slots=` in hostfiles, so the hosts go on the command line, where `host:ranks` is understood.
        ((counted)) || hosts=("${hosts[@]/%/:$most}")
        [[ -z $hostfile ]] || place+=(--host "$(IFS=, && echo "${hosts[*]}")")
        # Left alone it ties each of two ranks to one core; unbound, ranks divide the cores as distinf always does.
        [[ " ${options[*]-}" == *-bind-to* ]] || place+=(--bind-to none)
        map=${ppn:+ppr:$ppn:node} cores=$(lscpu -p=CORE,SOCKET | grep -v '^#' | sort -u | wc -l)
        [[ -z $hostfile ]] || map=''
        ((most <= cores)) || map+=:OVERSUBSCRIBE
        [[ -z $map || " ${options[*]-}" == *-map-by* ]] || place+=(--map-by "$map")
        # It refuses to start for root, as in a container, without this; no other user is given it.
        ((EUID)) || place+=(--allow-run-as-root) ;;
esac

settings=()
# shellcheck source=launch/env.sh
source "$here/env.sh"
command=("${start[@]}" "${place[@]}" "${options[@]}" -n "$n" "$program" "$@")
for word in "${settings[@]}" "${command[@]}"; do
    if [[ $word =~ ^[A-Za-z0-9_./:,@%+=-]+$ ]]; then printf '%s ' "$word"; else printf '%s ' "${word@Q}"; fi
done >&2
echo >&2
if [[ $family != openmpi && (-n $hostfile || " ${options[*]-}" == *-host* || ${SLURM_JOB_NUM_NODES:-1} != 1) ]]; then
    (end_when_cut_off $$ < /dev/null > /dev/null 2>&1 &)
fi
exec "${command[@]}"
