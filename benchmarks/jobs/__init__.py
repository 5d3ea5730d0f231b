"""What benchmarks run under mpiexec."""
