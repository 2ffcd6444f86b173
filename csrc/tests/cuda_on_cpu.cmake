# add_cuda_on_cpu(<name> [compile definitions...]): the emulator as a library, itself never instrumented. Its
# users compile .cu files as C++ and find the stand-in headers before any toolkit's.
function(add_cuda_on_cpu name)
  file(GLOB sources CONFIGURE_DEPENDS "${CMAKE_CURRENT_FUNCTION_LIST_DIR}/cuda_on_cpu/*.cpp")
  add_library(${name} STATIC ${sources})
  target_compile_features(${name} PUBLIC cxx_std_20)
  target_compile_options(${name} PRIVATE -O2 -g -Wall -Wextra INTERFACE -Wno-unknown-pragmas)
  target_compile_definitions(${name} PRIVATE ${ARGN})
  target_include_directories(${name} BEFORE PUBLIC
    "${CMAKE_CURRENT_FUNCTION_LIST_DIR}/cuda_on_cpu/include"
    "${CMAKE_CURRENT_FUNCTION_LIST_DIR}/..")
  set_target_properties(${name} PROPERTIES POSITION_INDEPENDENT_CODE ON CXX_EXTENSIONS OFF
    CXX_VISIBILITY_PRESET hidden)
endfunction()

# Source properties belong to a directory: call this where the target that compiles the files is made.
function(compile_cuda_as_cpp)
  set_source_files_properties(${ARGN} PROPERTIES LANGUAGE CXX)
endfunction()
