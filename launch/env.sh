# Sourced by mpirun.sh: every setting that a launch needs, with its reason. A variable the user has set is left alone;
# what is set here is printed in front of the command.
# Reads `family` (intel, mpich, openmpi), `hostfile` and `options`; fills `settings`.
# shellcheck shell=bash disable=SC2154

setting() { # NAME VALUE
    [[ -z ${!1+set} ]] || return 0
    export "$1=$2"
    ((${#settings[@]})) || settings=(env)
    settings+=("$1=$2")
}

# A host that does not answer, or whose ssh asks for a password or a host key, is an error within seconds that names it;
# else the launcher waits for ever, and Intel's then ignores SIGTERM. Batch systems start ranks in their own way.
if [[ -z ${SLURM_JOB_ID-}${PBS_ENVIRONMENT-}${PBS_NODEFILE-}${LSB_JOBID-}${PE_HOSTFILE-}${LOADL_HOSTFILE-} ]] &&
    [[ -n $hostfile || " ${options[*]-}" == *-host* ]]; then
    ssh_options='-o BatchMode=yes -o ConnectTimeout=10'
    case $family in
        # These two go to any remote shell: set them to nothing when using another one than ssh.
        intel) setting I_MPI_HYDRA_BOOTSTRAP_EXEC_EXTRA_ARGS "$ssh_options" ;;
        mpich) setting HYDRA_LAUNCHER_EXTRA_ARGS "$ssh_options" ;;
        openmpi)
            setting PRTE_MCA_plm_ssh_args "$ssh_options" # Open MPI 5
            setting OMPI_MCA_plm_rsh_args "$ssh_options" # Open MPI 4
            ;;
    esac
fi

# Not set, on purpose:
# - I_MPI_PIN, I_MPI_PIN_DOMAIN: Intel MPI gives each rank of a host its own part of the cores (all of them to one rank,
#   half to each of two), and distinf places its threads inside that part.
# - OMP_NUM_THREADS: distinf decides how many threads compute.
# - FI_PROVIDER, I_MPI_FABRICS: inside a host Intel MPI has its own shared memory, and libfabric finds the fastest network.
#   16 KiB all-reduce, 2 ranks of one host: 3.0 us by default and with every FI_PROVIDER; I_MPI_FABRICS=ofi 4.5 to 12 us.
# - I_MPI_THREAD_YIELD: by default ranks yield where they outnumber cores (4 ranks on 2 cores: 16-21 us; 3 gives 250 us,
#   0 and 1 did not finish).
# - I_MPI_ROOT, LD_LIBRARY_PATH, I_MPI_HYDRA_BOOTSTRAP, I_MPI_PMI_LIBRARY: the impi-rt wheel works without them, in a Slurm
#   job and under srun --mpi=pmi2 too.
# - CCL_*: distinf/comm/ccl.py makes oneCCL's settings, each with its reason, so that they hold under srun too.
