# cmake --install: the program, the libraries, the headers and find_package(natslm).
include(CMakePackageConfigHelpers)

install(TARGETS natslm EXPORT natslmTargets)
install(TARGETS nats-lm)
install(DIRECTORY natslm DESTINATION include FILES_MATCHING PATTERN "*.h"
        PATTERN "cli" EXCLUDE PATTERN "*-inl.h" EXCLUDE)

set(package_folder ${CMAKE_INSTALL_LIBDIR}/cmake/natslm)
install(EXPORT natslmTargets NAMESPACE natslm:: DESTINATION ${package_folder})
configure_package_config_file(cmake/natslmConfig.cmake.in natslmConfig.cmake
                              INSTALL_DESTINATION ${package_folder})
write_basic_package_version_file(natslmConfigVersion.cmake COMPATIBILITY SameMinorVersion)
install(FILES ${CMAKE_CURRENT_BINARY_DIR}/natslmConfig.cmake
              ${CMAKE_CURRENT_BINARY_DIR}/natslmConfigVersion.cmake cmake/FindLibTorch.cmake
        DESTINATION ${package_folder})
