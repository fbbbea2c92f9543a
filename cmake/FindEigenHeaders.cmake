# Finds Eigen's headers and makes the target fastbptt_eigen of them.
#
# Eigen comes from PyPI as cmeel-eigen, which keeps a prefix of its own inside site-packages, or from
# the system; so each prefix is tried as it is and with /cmeel.prefix behind it.
set(_prefixes ${CMAKE_PREFIX_PATH})
if(DEFINED ENV{CMAKE_PREFIX_PATH})
  string(REPLACE ":" ";" _from_environment "$ENV{CMAKE_PREFIX_PATH}")
  list(APPEND _prefixes ${_from_environment})
endif()
find_package(Python COMPONENTS Interpreter QUIET)
if(Python_SITELIB)
  list(APPEND _prefixes "${Python_SITELIB}")
endif()
set(_candidates)
foreach(_prefix IN LISTS _prefixes)
  list(APPEND _candidates "${_prefix}/cmeel.prefix/include/eigen3" "${_prefix}/include/eigen3")
endforeach()
find_path(FASTBPTT_EIGEN_INCLUDE_DIR NAMES Eigen/Core
          HINTS ${_candidates} PATH_SUFFIXES eigen3)
if(NOT FASTBPTT_EIGEN_INCLUDE_DIR)
  message(FATAL_ERROR "Eigen not found. Install it with 'pip install cmeel-eigen' or your system's "
                      "package (libeigen3-dev), or set FASTBPTT_EIGEN_INCLUDE_DIR.")
endif()
message(STATUS "Eigen: ${FASTBPTT_EIGEN_INCLUDE_DIR}")
add_library(fastbptt_eigen INTERFACE)
target_include_directories(fastbptt_eigen SYSTEM INTERFACE "${FASTBPTT_EIGEN_INCLUDE_DIR}")
