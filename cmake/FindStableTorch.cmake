# Defines the target schedulefree_stable_torch: torch's stable-ABI headers and the library with its C shims.
#
# Looks in SCHEDULEFREE_TORCH_ROOT (a directory with include/ and lib/: an unpacked libtorch, or the torch
# package of a Python environment), else where Torch_DIR or CMAKE_PREFIX_PATH leads, else asks the Python
# interpreter. PyTorch's pages have torch.utils.cmake_prefix_path in CMAKE_PREFIX_PATH: share/cmake of such a
# directory.

if(NOT SCHEDULEFREE_TORCH_ROOT)
  set(torch_prefixes ${CMAKE_PREFIX_PATH})
  cmake_path(CONVERT "$ENV{CMAKE_PREFIX_PATH}" TO_CMAKE_PATH_LIST torch_prefixes_of_environment)
  foreach(package IN ITEMS "${Torch_DIR}" ${torch_prefixes} ${torch_prefixes_of_environment})
    foreach(below IN ITEMS "../../.." "../..")
      get_filename_component(directory "${package}/${below}" ABSOLUTE)
      if(EXISTS "${directory}/share/cmake/Torch/TorchConfig.cmake" AND NOT SCHEDULEFREE_TORCH_ROOT)
        set(SCHEDULEFREE_TORCH_ROOT "${directory}")
      endif()
    endforeach()
  endforeach()
endif()
if(NOT SCHEDULEFREE_TORCH_ROOT)
  find_package(Python QUIET COMPONENTS Interpreter)
  if(Python_Interpreter_FOUND)
    execute_process(
      COMMAND "${Python_EXECUTABLE}" -c "import pathlib, torch; print(pathlib.Path(torch.__file__).parent)"
      OUTPUT_VARIABLE SCHEDULEFREE_TORCH_ROOT OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
  endif()
endif()

find_path(SCHEDULEFREE_TORCH_INCLUDE torch/headeronly/version.h HINTS "${SCHEDULEFREE_TORCH_ROOT}/include")
find_library(SCHEDULEFREE_TORCH_LIBRARY torch_cpu HINTS "${SCHEDULEFREE_TORCH_ROOT}/lib")
if(NOT SCHEDULEFREE_TORCH_INCLUDE OR NOT SCHEDULEFREE_TORCH_LIBRARY)
  message(FATAL_ERROR
    "torch ${SCHEDULEFREE_MIN_TORCH} or newer was not found. Install it in the Python environment of this build "
    "(pip install torch), or set SCHEDULEFREE_TORCH_ROOT to a libtorch directory that has include/ and lib/. "
    "A torch older than ${SCHEDULEFREE_MIN_TORCH} lacks the stable-ABI headers and is not found either.")
endif()

file(STRINGS "${SCHEDULEFREE_TORCH_INCLUDE}/torch/headeronly/version.h" version_lines REGEX "#define TORCH_VERSION_M[AJINOR]+ [0-9]+")
string(REGEX MATCH "TORCH_VERSION_MAJOR ([0-9]+)" _ "${version_lines}")
set(torch_major "${CMAKE_MATCH_1}")
string(REGEX MATCH "TORCH_VERSION_MINOR ([0-9]+)" _ "${version_lines}")
set(SCHEDULEFREE_TORCH_VERSION "${torch_major}.${CMAKE_MATCH_1}")
if(SCHEDULEFREE_TORCH_VERSION VERSION_LESS SCHEDULEFREE_MIN_TORCH)
  message(FATAL_ERROR
    "torch ${SCHEDULEFREE_TORCH_VERSION} in ${SCHEDULEFREE_TORCH_INCLUDE} is too old: schedulefree_cpp needs "
    "torch ${SCHEDULEFREE_MIN_TORCH} or newer (pip install --upgrade torch).")
endif()

# 0x020a000000000000 is torch 2.10: no symbol that came later may be used, whatever torch builds this.
add_library(schedulefree_stable_torch INTERFACE)
target_include_directories(schedulefree_stable_torch SYSTEM INTERFACE "${SCHEDULEFREE_TORCH_INCLUDE}")
target_link_libraries(schedulefree_stable_torch INTERFACE "${SCHEDULEFREE_TORCH_LIBRARY}")
math(EXPR torch_target "(${SCHEDULEFREE_MIN_TORCH_MAJOR} << 56) | (${SCHEDULEFREE_MIN_TORCH_MINOR} << 48)" OUTPUT_FORMAT HEXADECIMAL)
target_compile_definitions(schedulefree_stable_torch INTERFACE TORCH_TARGET_VERSION=${torch_target})
