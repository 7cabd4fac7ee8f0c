"""The processes of a job: how they find each other."""
import jax


def start(coordinator: str | None, processes: int | None, process: int | None) -> None:
  """Join the other processes, before JAX looks for devices: at the address `coordinator`, as number `process` of
  `processes`; where nothing is said, as the cluster says that JAX detects (TPU pod, Slurm, Open MPI, GKE), if there is one.

  `processes` = 1 alone asks for no other process and no detection. Raises ValueError where only a part is said.
  """
  if (coordinator, processes, process) == (None, 1, None):
    return
  said = {'--coordinator': coordinator, '--processes': processes, '--process': process}
  missing = [name for name, value in said.items() if value is None]
  if 0 < len(missing) < 3:
    raise ValueError(f'{" and ".join(missing)} missing. Type all of --coordinator=HOST:PORT --processes=N --process=I, '
                     'with another I from 0 to N-1 for each process; or none, in a cluster; or --processes=1 alone.')
  if missing:
    _detect()
    return
  if ':' not in coordinator:
    raise ValueError(f'--coordinator is {coordinator!r}; it must be HOST:PORT, the same for all processes.')
  if not 0 <= process < processes:
    raise ValueError(f'--process is {process}; with --processes={processes} it must be from 0 to {processes - 1}.')
  jax.distributed.initialize(coordinator, processes, process)


def _detect() -> None:
  try:
    jax.distributed.initialize()
  except ValueError as error:
    if 'coordinator_address should be defined' not in str(error):  # what JAX says where it detects no cluster
      raise
