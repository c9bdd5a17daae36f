# Compiler settings and the helper functions that every folder's CMakeLists.txt uses.

set(CMAKE_CXX_STANDARD 20)
set(CMAKE_CXX_STANDARD_REQUIRED ON)
set(CMAKE_CXX_EXTENSIONS OFF)
set(CMAKE_POSITION_INDEPENDENT_CODE ON)
if(NOT CMAKE_BUILD_TYPE)
  set(CMAKE_BUILD_TYPE Release CACHE STRING "build type" FORCE)
endif()
# -O2 without frame-by-frame debug data: the sanitizer build is Debug, but must stay usable.
set(CMAKE_CXX_FLAGS_RELEASE "-O2 -DNDEBUG")
set(CMAKE_CXX_FLAGS_DEBUG "-O1 -g1")

find_program(NATSLM_CCACHE ccache)
if(NATSLM_CCACHE)
  # Paths relative to the checkout, so that two build folders share their results.
  set(CMAKE_CXX_COMPILER_LAUNCHER ${CMAKE_COMMAND} -E env CCACHE_BASEDIR=${CMAKE_SOURCE_DIR}
      CCACHE_NOHASHDIR=1 ${NATSLM_CCACHE})
endif()
find_program(NATSLM_MOLD mold)
if(NATSLM_MOLD)
  # Without pages of its own for code, mold 1.10 may begin what is write-protected after loading
  # (RELRO) with a thread-local variable of LibTorch's headers in the gap before its page, one
  # program in some hundred: "cannot apply additional memory protection after relocation".
  add_link_options(-fuse-ld=mold -Wl,-z,separate-code)
endif()

add_library(natslm_warnings INTERFACE)
# Of C++; natslm_cuda_architectures has those of CUDA.
set(warnings -Wall -Wextra -Wshadow -Wnon-virtual-dtor -Woverloaded-virtual -Wno-sign-compare
    -Wno-missing-field-initializers)
if(NATSLM_WERROR)
  list(APPEND warnings -Werror)
endif()
target_compile_options(natslm_warnings INTERFACE "$<$<COMPILE_LANGUAGE:CXX>:${warnings}>")
if(NATSLM_SANITIZE)
  add_compile_options(-fsanitize=${NATSLM_SANITIZE} -fno-sanitize-recover=undefined
                      -fno-omit-frame-pointer -DNATSLM_SANITIZED=1)
  add_link_options(-fsanitize=${NATSLM_SANITIZE})
endif()

# natslm_library(NAME SOURCES... [DEPENDS targets...] [INTERNAL]): one folder of natslm/ as a static
# library; INTERNAL: of use to the program only, not installed.
# The dependency chain follows the include table of the architecture page.
function(natslm_library name)
  cmake_parse_arguments(arg "INTERNAL" "" "SOURCES;DEPENDS" ${ARGN})
  if(NOT arg_SOURCES)  # headers only
    add_library(${name} INTERFACE)
    target_include_directories(${name} INTERFACE $<BUILD_INTERFACE:${PROJECT_SOURCE_DIR}>
                               $<INSTALL_INTERFACE:include>)
    target_link_libraries(${name} INTERFACE ${arg_DEPENDS})
  else()
    add_library(${name} STATIC ${arg_SOURCES})
    target_include_directories(${name} PUBLIC $<BUILD_INTERFACE:${PROJECT_SOURCE_DIR}>
                               $<INSTALL_INTERFACE:include>)
    target_link_libraries(${name} PUBLIC ${arg_DEPENDS} PRIVATE $<BUILD_INTERFACE:natslm_warnings>)
  endif()
  if(NOT arg_INTERNAL)
    install(TARGETS ${name} EXPORT natslmTargets)
  endif()
endfunction()

# natslm_test(NAME SOURCES... DEPENDS targets... [LABELS labels...]): one test binary, one ctest entry
# (a LibTorch process costs 0.3 s to start, so tests are registered per binary).
function(natslm_test name)
  cmake_parse_arguments(arg "" "TIMEOUT" "SOURCES;DEPENDS;LABELS" ${ARGN})
  add_executable(${name} ${arg_SOURCES})
  target_link_libraries(${name} PRIVATE ${arg_DEPENDS} natslm_test_support natslm_warnings
                        GTest::gtest_main GTest::gmock)
  if(NOT arg_LABELS)
    set(arg_LABELS fast)
  endif()
  if("gpu" IN_LIST arg_LABELS)
    add_test(NAME ${name} COMMAND ${PROJECT_SOURCE_DIR}/tests/support/gpu_test $<TARGET_FILE:${name}>)
    set_tests_properties(${name} PROPERTIES RESOURCE_LOCK gpu)  # a GPU has no room for two
  else()
    add_test(NAME ${name} COMMAND ${name})
  endif()
  if(NOT arg_TIMEOUT)
    set(arg_TIMEOUT 600)
  endif()
  set_tests_properties(${name} PROPERTIES LABELS "${arg_LABELS}" TIMEOUT ${arg_TIMEOUT}
    ENVIRONMENT "ASAN_OPTIONS=detect_leaks=0;UBSAN_OPTIONS=print_stacktrace=1:suppressions=${PROJECT_SOURCE_DIR}/tests/support/sanitizers.supp")
endfunction()

# natslm_bench(NAME SOURCES... DEPENDS targets...): one Google Benchmark binary.
function(natslm_bench name)
  cmake_parse_arguments(arg "" "" "SOURCES;DEPENDS" ${ARGN})
  add_executable(${name} ${arg_SOURCES})
  target_link_libraries(${name} PRIVATE ${arg_DEPENDS} natslm_warnings benchmark::benchmark)
endfunction()
