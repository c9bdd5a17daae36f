# The CUDA compiler: on PATH, in /usr/local/cuda, or the wheels that `make cuda` puts into .venv.
# Everything here compiles and links on a machine without a GPU.
if(NOT CMAKE_CUDA_COMPILER)
  file(GLOB wheel_nvcc "${CMAKE_SOURCE_DIR}/.venv/lib/python3*/site-packages/nvidia/cu13/bin/nvcc")
  find_program(NATSLM_NVCC nvcc PATHS ${wheel_nvcc} /usr/local/cuda/bin)
  if(NOT NATSLM_NVCC AND wheel_nvcc)
    list(GET wheel_nvcc 0 NATSLM_NVCC)
  endif()
  if(NOT NATSLM_NVCC)
    message(FATAL_ERROR "NATSLM_CUDA is on and there is no nvcc: run 'make cuda', or put CUDA 13's nvcc on PATH")
  endif()
  set(CMAKE_CUDA_COMPILER "${NATSLM_NVCC}" CACHE FILEPATH "CUDA compiler")
endif()
set(CMAKE_CUDA_ARCHITECTURES OFF)  # chosen for each folder, see natslm_cuda_objects
set(CMAKE_CUDA_FLAGS_RELEASE "-O3 -DNDEBUG")
enable_language(CUDA)
# CMake 3.25 knows no CUDA dialect after C++17.
set(CMAKE_CUDA20_STANDARD_COMPILE_OPTION "-std=c++20")
set(CMAKE_CUDA20_EXTENSION_COMPILE_OPTION "-std=c++20")
set(CMAKE_CUDA_STANDARD 20)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)
if(CMAKE_CUDA_COMPILER_VERSION VERSION_LESS 13.0)
  message(FATAL_ERROR "CUDA ${CMAKE_CUDA_COMPILER_VERSION} is too old: 13.0 or later is needed")
endif()
if(NATSLM_CCACHE)
  set(CMAKE_CUDA_COMPILER_LAUNCHER ${CMAKE_CXX_COMPILER_LAUNCHER})
endif()


# For host code that calls the runtime. Static, as nvcc links it: a program without LibTorch then runs
# wherever there is a driver.
get_filename_component(toolkit_root "${CMAKE_CUDA_COMPILER}" DIRECTORY)
get_filename_component(toolkit_root "${toolkit_root}" DIRECTORY)
find_library(NATSLM_CUDA_RUNTIME cudart_static REQUIRED
  PATHS ${CMAKE_CUDA_HOST_IMPLICIT_LINK_DIRECTORIES} ${toolkit_root}/lib64 ${toolkit_root}/lib NO_DEFAULT_PATH)
mark_as_advanced(NATSLM_NVCC NATSLM_CUDA_RUNTIME)
add_library(natslm_cuda_runtime INTERFACE)
target_include_directories(natslm_cuda_runtime SYSTEM INTERFACE
  "$<BUILD_INTERFACE:${CMAKE_CUDA_TOOLKIT_INCLUDE_DIRECTORIES}>")
target_link_libraries(natslm_cuda_runtime INTERFACE "${NATSLM_CUDA_RUNTIME}" dl rt)
install(TARGETS natslm_cuda_runtime EXPORT natslmTargets)

# natslm_cuda_architectures(ARCHITECTURES SOURCES...): what a folder's .cu files are compiled for, e.g.
# "80-virtual;90a-real" (virtual: PTX, which newer chips compile at start). Other files are left alone.
function(natslm_cuda_architectures architectures)
  set(flags --expt-relaxed-constexpr --extended-lambda -Wno-unused-parameter)
  foreach(architecture ${architectures})
    string(REGEX REPLACE "-.*" "" number "${architecture}")
    if(architecture MATCHES "-virtual$")
      list(APPEND flags "-gencode=arch=compute_${number},code=compute_${number}")
    else()
      list(APPEND flags "-gencode=arch=compute_${number},code=sm_${number}")
    endif()
  endforeach()
  if(NATSLM_WERROR)
    list(APPEND flags -Werror=all-warnings)
  endif()
  list(FILTER ARGN INCLUDE REGEX "\\.cu$")
  if(ARGN)
    set_source_files_properties(${ARGN} PROPERTIES COMPILE_OPTIONS "${flags}")
  endif()
endfunction()
