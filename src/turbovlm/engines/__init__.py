"""turbovlm inside serving engines. Each is a package of its own, imported by the engine and by nothing else."""
