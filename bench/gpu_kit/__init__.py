"""Everything to be asked of a machine with a GPU, in one command that ends within eight minutes.

    python -m bench.gpu_kit                        all parts, one after the other
    python -m bench.gpu_kit --parts build,tests    these alone
    python -m bench.gpu_kit --dry-run              what would run
    python -m bench.gpu_kit --pack build/wheels    here: the wheels that such a machine may lack (carry them along)

    machine     GPU, driver, clocks, compilers, versions
    build       the library with CUDA kernels, by CMake or, without it, by nvcc and g++ directly
    tests       the suites on CUDA tensors, with the CUDA and with the Triton kernels
    bench       the bandwidth ceiling, then every benchmark row
    sanitizer   compute-sanitizer over small shapes: memcheck, racecheck, synccheck
    counters    bytes from device memory by the hardware counters (Nsight Compute)

Without a build that succeeds, the Triton kernels are tested and the ceiling is measured all the same.

No network is needed: torch, Triton, nvcc and g++ are the machine's own. A part that is done is not run again as long
as the sources it depends on stay the same (--again forces it), so a run that was cut short is taken up by the same
command. Every part leaves a JSON file, all of them one log, under build/gpu_kit, and copies in $OUT or --out.

    runner    parts, budgets, states, resuming          parts     what each part does
    build     the library and a site that imports it    shapes    the small calls that sanitizers and counters watch
    pack      wheels                                    recorder  a pytest plugin: outcomes that survive a time limit
"""
