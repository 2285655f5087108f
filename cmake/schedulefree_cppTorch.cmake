# Finds libtorch by its files, for the build and for programs: torch's own CMake package asks for a CUDA toolkit where
# torch has CUDA, and who installs torch by pip need not have one.
#
#     schedulefree_find_torch([ROOT ...])
#
# looks in SCHEDULEFREE_TORCH_ROOT (a directory with include/ and lib/: an unpacked libtorch, or the torch package of a
# Python environment), else where Torch_DIR or CMAKE_PREFIX_PATH leads, else in each ROOT, else asks the Python
# interpreter. PyTorch's pages have torch.utils.cmake_prefix_path in CMAKE_PREFIX_PATH: share/cmake of such a directory.
#
# It sets SCHEDULEFREE_TORCH_INCLUDE, SCHEDULEFREE_TORCH_LIBRARY (torch_cpu, with the C shims of the stable ABI) and
# SCHEDULEFREE_TORCH_VERSION, and defines schedulefree_cpp::torch, all of libtorch for a program; or it sets
# SCHEDULEFREE_TORCH_PROBLEM, which is empty otherwise.
function(schedulefree_find_torch)
  set(root "${SCHEDULEFREE_TORCH_ROOT}")
  set(prefixes "${Torch_DIR}" ${CMAKE_PREFIX_PATH})
  cmake_path(CONVERT "$ENV{CMAKE_PREFIX_PATH}" TO_CMAKE_PATH_LIST prefixes_of_environment)
  set(candidates "")
  foreach(prefix IN LISTS prefixes prefixes_of_environment)
    list(APPEND candidates "${prefix}/../../.." "${prefix}/../.." "${prefix}")
  endforeach()
  foreach(candidate IN LISTS candidates ARGN)
    if(NOT root AND EXISTS "${candidate}/share/cmake/Torch/TorchConfig.cmake")
      get_filename_component(root "${candidate}" ABSOLUTE)
    endif()
  endforeach()
  if(NOT root)
    find_package(Python QUIET COMPONENTS Interpreter)
    if(Python_Interpreter_FOUND)
      execute_process(
        COMMAND "${Python_EXECUTABLE}" -c "import pathlib, torch; print(pathlib.Path(torch.__file__).parent)"
        OUTPUT_VARIABLE root OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
    endif()
  endif()

  find_path(SCHEDULEFREE_TORCH_INCLUDE torch/headeronly/version.h HINTS "${root}/include")
  find_library(SCHEDULEFREE_TORCH_LIBRARY torch_cpu HINTS "${root}/lib")
  if(NOT SCHEDULEFREE_TORCH_INCLUDE OR NOT SCHEDULEFREE_TORCH_LIBRARY)
    string(CONCAT problem
      "torch ${SCHEDULEFREE_MIN_TORCH} or newer was not found. Install it in the Python environment of this build "
      "(pip install torch), or set SCHEDULEFREE_TORCH_ROOT to a libtorch directory that has include/ and lib/. "
      "A torch older than ${SCHEDULEFREE_MIN_TORCH} lacks the stable-ABI headers and is not found either.")
    set(SCHEDULEFREE_TORCH_PROBLEM "${problem}" PARENT_SCOPE)
    return()
  endif()

  file(STRINGS "${SCHEDULEFREE_TORCH_INCLUDE}/torch/headeronly/version.h" lines REGEX "#define TORCH_VERSION_M[AJINOR]+ [0-9]+")
  string(REGEX MATCH "TORCH_VERSION_MAJOR ([0-9]+)" _ "${lines}")
  set(version "${CMAKE_MATCH_1}")
  string(REGEX MATCH "TORCH_VERSION_MINOR ([0-9]+)" _ "${lines}")
  string(APPEND version ".${CMAKE_MATCH_1}")
  if(version VERSION_LESS SCHEDULEFREE_MIN_TORCH)
    string(CONCAT problem
      "torch ${version} in ${SCHEDULEFREE_TORCH_INCLUDE} is too old: schedulefree_cpp needs "
      "torch ${SCHEDULEFREE_MIN_TORCH} or newer (pip install --upgrade torch).")
    set(SCHEDULEFREE_TORCH_PROBLEM "${problem}" PARENT_SCOPE)
    return()
  endif()
  set(SCHEDULEFREE_TORCH_VERSION "${version}" PARENT_SCOPE)
  set(SCHEDULEFREE_TORCH_PROBLEM "" PARENT_SCOPE)

  if(NOT TARGET schedulefree_cpp::torch)
    get_filename_component(libraries "${SCHEDULEFREE_TORCH_LIBRARY}" DIRECTORY)
    add_library(schedulefree_cpp::torch INTERFACE IMPORTED GLOBAL)
    target_include_directories(schedulefree_cpp::torch SYSTEM INTERFACE
      "${SCHEDULEFREE_TORCH_INCLUDE}" "${SCHEDULEFREE_TORCH_INCLUDE}/torch/csrc/api/include")
    target_link_libraries(schedulefree_cpp::torch INTERFACE
      "${libraries}/libtorch.so" "${SCHEDULEFREE_TORCH_LIBRARY}" "${libraries}/libc10.so")
    # A program calls nothing of libtorch.so, which brings the CUDA library: no linker may leave it out.
    target_link_options(schedulefree_cpp::torch INTERFACE LINKER:--no-as-needed)
    if(version VERSION_GREATER_EQUAL 2.14)
      target_compile_features(schedulefree_cpp::torch INTERFACE cxx_std_20)  # what its headers ask for
    endif()
  endif()
endfunction()
