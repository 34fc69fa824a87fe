#!/usr/bin/env bash
# Start distinf ranks with whatever MPI launcher there is: print the full command on stderr, then exec it.
#
#   launch/mpirun.sh -n 2 [-ppn 1] [-f hostfiles/4x2.txt] [--mpirun PATH] [launcher options ...] -- generate --prompt "..."
#
# After `--`: a sub-command of distinf, or `python ...`, or a program given with its path (./prog, /bin/hostname).
# Hostfile: one `host` or `host:ranks` a line, `#` lines are comments; without -ppn, -n is spread evenly over the hosts.
set -euo pipefail
here=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")

die() { printf 'mpirun.sh: %s\n' "$1" >&2; exit 2; }

find_tool() { # the first of the names "$@" in the repository's .venv, else the active environment, else on PATH
    local dir name
    for dir in "${here%/*}/.venv/bin" ${VIRTUAL_ENV:+"$VIRTUAL_ENV/bin"}; do
        for name; do [[ -x $dir/$name ]] && echo "$dir/$name" && return; done
    done
    for name; do type -P -- "$name" && return; done
    return 1
}

number() { [[ $2 =~ ^[1-9][0-9]{0,5}$ ]] || die "$1 must be a positive number, got '$2'"; }

n='' ppn='' hostfile='' launcher='' options=()
while (($#)) && [[ $1 != -- ]]; do
    case $1 in
        -n | -np | -ppn | -f | --mpirun) [[ ${2---} != -- ]] || die "$1 needs a value" ;;&
        -n | -np) number "$1" "$2"; n=$2; shift 2 ;;
        -ppn) number "$1" "$2"; ppn=$2; shift 2 ;;
        -f) hostfile=$2; shift 2 ;;
        --mpirun) launcher=$(type -P -- "$2") || die "--mpirun $2: no such executable"; shift 2 ;;
        -h | --help) sed -n '2,7s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;;
        *) options+=("$1"); shift ;;
    esac
done
(($# > 1)) || die "nothing to run: put '--' and a command last, for example: -n 2 -- info"
shift
[[ -n $n ]] || die "-n is missing: say how many ranks to start"

# What to run. Bare words are distinf's: `info` is also a program of most systems.
case $1 in
    python | python3) program=$(find_tool python python3) || die "python not found: run 'make venv'"; shift ;;
    */*) program=$(type -P -- "$1") || die "$1: no such executable"; shift ;;
    *) program=$(find_tool distinf) || die "distinf not found: run 'make venv' or activate its environment" ;;
esac

# Which launcher. Its folder goes first on PATH, because the Intel wheel's mpirun looks for mpiexec.hydra there.
[[ -n $launcher ]] || launcher=$(find_tool mpirun mpiexec) || die "no MPI launcher: run 'make venv', or give --mpirun PATH"
bin=$(cd "$(dirname "$launcher")" && pwd)
version=$(PATH=$bin:$PATH "$launcher" --version 2>&1 || true)
case $version in
    *"Intel(R) MPI"*) family=intel ;;
    *HYDRA* | *MPICH*) family=mpich ;;
    *"Open MPI"* | *OpenRTE*) family=openmpi ;;
    *) die "$launcher is not Intel MPI, MPICH or Open MPI: its --version says '${version%%$'\n'*}'" ;;
esac

# Where the ranks go: hosts, and the most ranks that one host gets.
hosts=() counted=0 room=0 most=${ppn:-$n}
if [[ -n $hostfile ]]; then
    [[ -f $hostfile && -r $hostfile ]] || die "-f $hostfile: no such file"
    while read -r line || [[ -n $line ]]; do
        [[ -z $line || $line == \#* ]] && continue
        [[ $line =~ ^([A-Za-z0-9._-]+)(:([1-9][0-9]{0,5}))?$ ]] || die "-f $hostfile: expected 'host' or 'host:ranks', got '$line'"
        hosts+=("$line")
        [[ -z ${BASH_REMATCH[3]} ]] || counted=$((counted + 1)) room=$((room + BASH_REMATCH[3]))
        getent ahosts "${BASH_REMATCH[1]}" > /dev/null || die "-f $hostfile: unknown host '${BASH_REMATCH[1]}'"
    done < "$hostfile"
    ((${#hosts[@]})) || die "-f $hostfile: it names no host"
    ((counted == 0 || counted == ${#hosts[@]})) || die "-f $hostfile: give ':ranks' on every line or on none"
    [[ $counted == 0 || -z $ppn ]] || die "-ppn $ppn: $hostfile already gives the ranks of each host"
    ((counted)) || most=${ppn:-$(((n + ${#hosts[@]} - 1) / ${#hosts[@]}))} room=$((${ppn:-n} * ${#hosts[@]}))
    ((n <= room)) || die "-n $n: $hostfile${ppn:+ with -ppn $ppn} has room for $room ranks"
fi

place=()
case $family in
    intel | mpich)
        # Intel's -f ignores `host:ranks` and its -machinefile ignores -ppn; MPICH's -f takes both.
        flag=-f
        [[ $family != intel || $counted == 0 ]] || flag=-machinefile
        [[ -z $hostfile ]] || place+=("$flag" "$hostfile")
        [[ -z $ppn$hostfile || $counted != 0 ]] || place+=(-ppn "$most") ;;
    openmpi)
        # It wants `slots=` in hostfiles, so the hosts go on the command line, where `host:ranks` is understood.
        [[ $counted != 0 ]] || hosts=("${hosts[@]/%/:$most}")
        [[ -z $hostfile ]] || place+=(--host "$(IFS=, && echo "${hosts[*]}")")
        # By default it ties each of two ranks to a single core; distinf divides the cores among the ranks itself.
        [[ " ${options[*]-}" == *" --bind-to"* ]] || place+=(--bind-to none)
        map=${ppn:+ppr:$ppn:node} cores=$(lscpu -p=CORE,SOCKET | grep -v '^#' | sort -u | wc -l)
        [[ -z $hostfile ]] || map=''
        ((most <= cores)) || map+=:OVERSUBSCRIBE
        [[ -z $map ]] || place+=(--map-by "$map")
        # It refuses to start for root, as in a container, without this; nobody else is given it.
        ((EUID)) || place+=(--allow-run-as-root) ;;
esac

# Intel's mpirun is a shell script that, killed by SIGTERM, leaves the ranks running; mpiexec.hydra ends them. The script
# stays where it has work to do: another batch system than Slurm, or an installation whose vars.sh was not sourced.
start=("$launcher")
if [[ $family == intel ]]; then
    if [[ -x $bin/mpiexec.hydra && -z ${PBS_ENVIRONMENT-}${PBS_NODEFILE-}${LSB_JOBID-}${PE_HOSTFILE-}${LOADL_HOSTFILE-} &&
        (-n ${I_MPI_ROOT-} || ! -f $bin/../env/vars.sh) ]]; then
        start=("$bin/mpiexec.hydra")
    else
        start=(env "PATH=$bin:$PATH" "$launcher")
    fi
fi

settings=()
# shellcheck source=launch/env.sh
source "$here/env.sh"
command=("${start[@]}" "${place[@]}" "${options[@]}" -n "$n" "$program" "$@")
for word in "${settings[@]}" "${command[@]}"; do
    [[ $word =~ ^[][A-Za-z0-9_./:,@%+=-]+$ ]] && printf '%s ' "$word" || printf '%s ' "${word@Q}"
done >&2
echo >&2
exec "${command[@]}"
