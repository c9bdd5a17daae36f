# Finds LibTorch inside the PyTorch wheel that `make setup` puts into .venv (or NATSLM_TORCH_ROOT:
# a folder that holds include/ and lib/). The wheel's own TorchConfig.cmake insists on a CUDA
# toolkit even for CPU programs, so the imported targets are made here:
#   torch::c10, torch::cpu   what a CPU program links
#   torch::cuda              with NATSLM_CUDA: also the GPU libraries. Linking needs none of the other
#                            nvidia wheels, running does: pip install torch==<version of versions.txt>

set(NATSLM_TORCH_ROOT "" CACHE PATH "folder of the torch package (holds include/ and lib/)")
if(NOT NATSLM_TORCH_ROOT)
  file(GLOB candidates "${CMAKE_SOURCE_DIR}/.venv/lib/python3*/site-packages/torch")
  if(candidates)
    list(GET candidates 0 found_root)
    set(NATSLM_TORCH_ROOT "${found_root}" CACHE PATH "folder of the torch package" FORCE)
  endif()
endif()

find_path(LibTorch_INCLUDE_DIR ATen/core/Tensor.h PATHS "${NATSLM_TORCH_ROOT}/include" NO_DEFAULT_PATH)
find_library(LibTorch_C10 c10 PATHS "${NATSLM_TORCH_ROOT}/lib" NO_DEFAULT_PATH)
find_library(LibTorch_CPU torch_cpu PATHS "${NATSLM_TORCH_ROOT}/lib" NO_DEFAULT_PATH)

include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(LibTorch
  REQUIRED_VARS LibTorch_INCLUDE_DIR LibTorch_C10 LibTorch_CPU
  REASON_FAILURE_MESSAGE "LibTorch was not found: run 'make setup', or pass -DNATSLM_TORCH_ROOT=<folder with include/ and lib/>")

if(LibTorch_FOUND AND NOT TARGET torch::cpu)
  add_library(torch::c10 SHARED IMPORTED)
  set_target_properties(torch::c10 PROPERTIES
    IMPORTED_LOCATION "${LibTorch_C10}"
    INTERFACE_INCLUDE_DIRECTORIES
      "${LibTorch_INCLUDE_DIR};${LibTorch_INCLUDE_DIR}/torch/csrc/api/include"
    # One header per operator instead of one that declares all: seconds saved in every file.
    INTERFACE_COMPILE_DEFINITIONS AT_PER_OPERATOR_HEADERS)
  add_library(torch::cpu SHARED IMPORTED)
  set_target_properties(torch::cpu PROPERTIES
    IMPORTED_LOCATION "${LibTorch_CPU}"
    INTERFACE_LINK_LIBRARIES "torch::c10"
    # The wheel's own run paths reach its neighbours only for itself.
    INTERFACE_LINK_OPTIONS "-Wl,--allow-shlib-undefined")
endif()
if(LibTorch_FOUND AND NATSLM_CUDA AND NOT TARGET torch::cuda)
  find_library(LibTorch_CUDA torch_cuda PATHS "${NATSLM_TORCH_ROOT}/lib" NO_DEFAULT_PATH REQUIRED)
  find_library(LibTorch_C10_CUDA c10_cuda PATHS "${NATSLM_TORCH_ROOT}/lib" NO_DEFAULT_PATH REQUIRED)
  mark_as_advanced(LibTorch_CUDA LibTorch_C10_CUDA)
  add_library(torch::cuda INTERFACE IMPORTED)
  # torch_cuda registers its kernels when it is loaded; no symbol of it need be used.
  target_link_libraries(torch::cuda INTERFACE torch::cpu
    "-Wl,--no-as-needed" "${LibTorch_CUDA}" "${LibTorch_C10_CUDA}" "-Wl,--as-needed")
  target_include_directories(torch::cuda INTERFACE ${CMAKE_CUDA_TOOLKIT_INCLUDE_DIRECTORIES})
endif()
mark_as_advanced(LibTorch_INCLUDE_DIR LibTorch_C10 LibTorch_CPU)
