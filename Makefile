# The front door. Every target does its own set-up; nothing has to be run before it.
# SPDX-License-Identifier: Apache-2.0

# As many compilers as there are cores, but no more than memory holds (1.5 GB each).
JOBS ?= $(shell awk -v cores=$$(nproc) '/MemAvailable/ { m = int($$2 / 1500000); print (m < 1 ? 1 : m < cores ? m : cores) }' /proc/meminfo)
PRESET ?= cpu-release

.PHONY: help setup build test cuda cuda-test check check-asan bench demo demo-train format clean

help:
	@echo "make demo     a real pretrained model with a quarter of its cache, beside the full one and its rivals, in"
	@echo "              some minutes (TEXT=path: on your own text; otherwise on Python's manual)"
	@echo "make demo-train   train, evaluate and generate with learned key lifetimes from scratch, in some minutes"
	@echo "              (TEXT=path: on your own text; otherwise on Python's own sources)"
	@echo "make test     build and run the tests"
	@echo "make build    build everything; the program is build/$(PRESET)/nats-lm"
	@echo "make cuda     the same with the GPU kernels; needs no GPU; the program is build/cuda-release/nats-lm"
	@echo "make cuda-test   build and run the tests that need a GPU"
	@echo "make bench    speed beside dense attention on this machine"
	@echo "make check    all that CI does: format, layering, warnings, tests, examples, documentation"
	@echo "make check-asan   the tests under the address and undefined-behaviour sanitizers"
	@echo "make setup    install what is missing (apt as root, pip into .venv)"
	@echo "make format   format the sources"
	@echo "make clean    remove build folders"

setup:
	@tools/setup

build: setup
	@cmake --preset $(PRESET) --log-level=WARNING
	@cmake --build --preset $(PRESET) -j $(JOBS)

test: build
	@ctest --preset $(PRESET) -j $(JOBS)

cuda:
	@tools/setup cuda
	@cmake --preset cuda-release --log-level=WARNING
	@cmake --build --preset cuda-release -j $(JOBS)

cuda-test: cuda
	@ctest --preset cuda-release -L gpu

check:
	@JOBS=$(JOBS) tools/check

check-asan: setup
	@$(MAKE) --no-print-directory PRESET=cpu-asan test

bench: build
	@tools/bench build/$(PRESET)

demo demo-train: setup
	@cmake --preset $(PRESET) --log-level=WARNING
	@cmake --build --preset $(PRESET) -j $(JOBS) --target nats-lm
	@$(if $(filter demo,$@),tools/fetch_model)
	@$(if $(filter demo,$@),tools/demo,tools/demo_train) build/$(PRESET)/nats-lm $(if $(TEXT),"$(TEXT)")

format: setup
	@git ls-files -z '*.h' '*.cc' '*.cuh' '*.cu' | xargs -0 .venv/bin/clang-format -i

clean:
	@rm -rf build
