# Writes the device sources as C++ string literals, one line `{name, text},` each, for csrc/cuda/embedded_sources.h.
#   cmake -DDIRECTORY=csrc -DOUTPUT=embedded_sources.inc -DSOURCES="update_math.h;..." -P EmbedSources.cmake
foreach(name IN LISTS SOURCES)
  file(READ "${DIRECTORY}/${name}" text)
  string(APPEND all "{\"${name}\", R\"cuda(${text})cuda\"},\n")
endforeach()
file(WRITE "${OUTPUT}" "${all}")
