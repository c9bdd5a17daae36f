# Run at every build (see natslm/base/CMakeLists.txt): writes OUTPUT from INPUT with the version and the
# commit in it, and touches the file only when they changed.
find_package(Git QUIET)
set(NATSLM_COMMIT unknown)
if(Git_FOUND)
  execute_process(COMMAND ${GIT_EXECUTABLE} rev-parse --short=10 HEAD WORKING_DIRECTORY ${SOURCE}
                  OUTPUT_VARIABLE hash OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET RESULT_VARIABLE failed)
  if(NOT failed)
    execute_process(COMMAND ${GIT_EXECUTABLE} diff --quiet HEAD WORKING_DIRECTORY ${SOURCE}
                    ERROR_QUIET RESULT_VARIABLE changed)
    set(NATSLM_COMMIT ${hash})
    if(changed)
      string(APPEND NATSLM_COMMIT "+changes")
    endif()
  endif()
endif()
configure_file(${INPUT} ${OUTPUT} @ONLY)
