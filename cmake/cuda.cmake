# The CUDA compiler: on PATH, in /usr/local/cuda, or the wheels that `make cuda` puts into .venv.
# Everything here compiles and links on a machine without a GPU.
if(NOT CMAKE_CUDA_COMPILER)
  execute_process(COMMAND ${CMAKE_SOURCE_DIR}/tools/find_nvcc OUTPUT_VARIABLE nvcc OUTPUT_STRIP_TRAILING_WHITESPACE)
  if(NOT nvcc)
    message(FATAL_ERROR "NATSLM_CUDA is on and there is no nvcc 13 or later: run 'make cuda', or put one on PATH")
  endif()
  set(CMAKE_CUDA_COMPILER "${nvcc}" CACHE FILEPATH "CUDA compiler")
endif()
set(CMAKE_CUDA_ARCHITECTURES OFF)  # chosen for each folder, see natslm_cuda_architectures
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


# Kernels are compiled by few jobs at a time: a big one takes 3 GB.
cmake_host_system_information(RESULT available_mib QUERY AVAILABLE_PHYSICAL_MEMORY)
math(EXPR cuda_jobs "${available_mib} / 3000")
if(cuda_jobs LESS 1)
  set(cuda_jobs 1)
endif()
set_property(GLOBAL APPEND PROPERTY JOB_POOLS cuda=${cuda_jobs})

# For host code that calls the runtime. Static, as nvcc links it: a program without LibTorch then runs
# wherever there is a driver.
get_filename_component(toolkit_root "${CMAKE_CUDA_COMPILER}" DIRECTORY)
get_filename_component(toolkit_root "${toolkit_root}" DIRECTORY)
find_library(NATSLM_CUDA_RUNTIME cudart_static REQUIRED
  PATHS ${CMAKE_CUDA_HOST_IMPLICIT_LINK_DIRECTORIES} ${toolkit_root}/lib64 ${toolkit_root}/lib NO_DEFAULT_PATH)
mark_as_advanced(NATSLM_CUDA_RUNTIME)
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
