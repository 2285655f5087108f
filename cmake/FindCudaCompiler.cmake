# Enables CUDA, unless SCHEDULEFREE_CUDA is OFF, or AUTO where there is no nvcc.
#
# Sets SCHEDULEFREE_CUDA_MISSING: empty where CUDA is enabled, else why it is not. Whether this machine has a GPU plays
# no part. Architectures come from CMAKE_CUDA_ARCHITECTURES, the environment's CUDAARCHS (both as CMake writes
# them: 80-real;90), or TORCH_CUDA_ARCH_LIST (as torch's extensions do: 8.0;9.0+PTX).

set(SCHEDULEFREE_CUDA_MISSING "")
if(NOT SCHEDULEFREE_CUDA MATCHES "^(AUTO|ON|OFF|1|0|TRUE|FALSE)$")
  message(FATAL_ERROR "SCHEDULEFREE_CUDA: expected ON, OFF or AUTO, got '${SCHEDULEFREE_CUDA}'")
elseif(SCHEDULEFREE_CUDA STREQUAL "AUTO" OR SCHEDULEFREE_CUDA)
  include(CheckLanguage)
  check_language(CUDA)
  if(NOT CMAKE_CUDA_COMPILER)
    set(SCHEDULEFREE_CUDA_MISSING "not built: no nvcc was found (on PATH, or as CUDACXX)")
    if(NOT SCHEDULEFREE_CUDA STREQUAL "AUTO")
      message(FATAL_ERROR
        "SCHEDULEFREE_CUDA is ${SCHEDULEFREE_CUDA}, but no nvcc was found that works. Install the CUDA toolkit (12.1 or newer) and put its "
        "bin directory on PATH, or set CUDACXX to its nvcc. Without CUDA: SCHEDULEFREE_CUDA=OFF.")
    endif()
  endif()
else()
  set(SCHEDULEFREE_CUDA_MISSING "not built: SCHEDULEFREE_CUDA is ${SCHEDULEFREE_CUDA}")
endif()

if(SCHEDULEFREE_CUDA_MISSING STREQUAL "")
  # Before CUDA is enabled, which would leave a choice of its own in the cache.
  if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
    if(DEFINED ENV{CUDAARCHS})
      set(CMAKE_CUDA_ARCHITECTURES "$ENV{CUDAARCHS}")
    elseif(DEFINED ENV{TORCH_CUDA_ARCH_LIST})
      string(REGEX REPLACE "[ ,;]+" ";" listed "$ENV{TORCH_CUDA_ARCH_LIST}")
      set(CMAKE_CUDA_ARCHITECTURES "")
      foreach(architecture IN LISTS listed)
        if(NOT architecture MATCHES "^([0-9]+)\\.([0-9]+a?)(\\+PTX)?$")
          message(FATAL_ERROR "TORCH_CUDA_ARCH_LIST: expected numbers such as 8.0;9.0+PTX, got '${architecture}'")
        endif()
        set(number "${CMAKE_MATCH_1}${CMAKE_MATCH_2}")
        if(CMAKE_MATCH_3)
          list(APPEND CMAKE_CUDA_ARCHITECTURES "${number}")
        else()
          list(APPEND CMAKE_CUDA_ARCHITECTURES "${number}-real")
        endif()
      endforeach()
    else()
      # Every generation since Turing, and for those to come the code that the driver compiles (PTX).
      execute_process(COMMAND "${CMAKE_CUDA_COMPILER}" --version OUTPUT_VARIABLE nvcc_says)
      string(REGEX MATCH "release ([0-9.]+)" _ "${nvcc_says}")
      set(CMAKE_CUDA_ARCHITECTURES 75-real 80-real 86-real 89-real)
      if(CMAKE_MATCH_1 VERSION_LESS 12.8)
        list(APPEND CMAKE_CUDA_ARCHITECTURES 90)
      else()
        list(APPEND CMAKE_CUDA_ARCHITECTURES 90-real 100-real 120)
      endif()
    endif()
  endif()
  enable_language(CUDA)
endif()
