# One object library an instruction set, all from the same sources.
#
# Inline functions of the same name in two such objects would be merged by the linker, and the one
# with the wrong instructions might stay. So Eigen is renamed in each (-DEigen=Eigen_<isa>), the
# kernels live in a namespace named after the instruction set, and link-time optimisation is off.
# tests/check_symbols.py reads the objects and fails on any weak symbol that two of them share.
#
# -DFASTBPTT_ISAS=... builds fewer of them.
if(NOT DEFINED FASTBPTT_ISAS)
  if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$")
    set(FASTBPTT_ISAS amx avx512_bf16 avx512 avx2 baseline)
  else()
    set(FASTBPTT_ISAS baseline)
  endif()
elseif(NOT "baseline" IN_LIST FASTBPTT_ISAS)
  message(FATAL_ERROR "FASTBPTT_ISAS: got '${FASTBPTT_ISAS}', wanted baseline among them")
endif()
set(FASTBPTT_FLAGS_baseline "")
set(FASTBPTT_FLAGS_avx2 -mavx2 -mfma)
set(FASTBPTT_FLAGS_avx512 -mavx512f -mavx512dq -mavx512bw -mavx512vl -mavx2 -mfma
                          -mprefer-vector-width=512)

# Sets that Eigen does not know: products of bfloat16 parts, which go with the kernels of avx512.
set(FASTBPTT_PART_PRODUCTS amx avx512_bf16)
set(FASTBPTT_FLAGS_avx512_bf16 ${FASTBPTT_FLAGS_avx512} -mavx512bf16)
set(FASTBPTT_FLAGS_amx ${FASTBPTT_FLAGS_avx512})
option(FASTBPTT_EMULATE_AMX "Plain C++ in the place of the instructions of AMX, for tests" OFF)
foreach(isa IN LISTS FASTBPTT_PART_PRODUCTS)
  if(isa IN_LIST FASTBPTT_ISAS AND NOT "avx512" IN_LIST FASTBPTT_ISAS)
    list(APPEND FASTBPTT_ISAS avx512)
  endif()
endforeach()

set(FASTBPTT_KERNEL_FLAGS -O3 -fno-exceptions -fno-rtti -fno-math-errno -fno-trapping-math -fno-lto)
if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
  # GCC's own AVX-512 header reads undefined registers on purpose, and GCC 12 warns of it (its bug
  # 105593).
  foreach(isa avx512 avx512_bf16 amx)
    list(APPEND FASTBPTT_FLAGS_${isa} -Wno-maybe-uninitialized -Wno-uninitialized)
  endforeach()
  # A vector type as a template argument loses its alignment attribute, which Eigen does not need.
  list(APPEND FASTBPTT_KERNEL_FLAGS -Wno-ignored-attributes)
endif()

# One object library of an instruction set, under `target`.
function(fastbptt_add_isa_objects target isa)
  set(objects ${target}_${isa})
  add_library(${objects} OBJECT ${ARGN})
  target_include_directories(${objects} PRIVATE cpp/include cpp/src)
  target_compile_definitions(${objects} PRIVATE
    FASTBPTT_ISA=${isa} Eigen=Eigen_${isa}
    EIGEN_DONT_PARALLELIZE EIGEN_MPL2_ONLY EIGEN_NO_DEBUG
    # The order of Eigen's sums for tiny products depends on the alignment of their arguments.
    EIGEN_GEMM_TO_COEFFBASED_THRESHOLD=1)
  target_compile_options(${objects} PRIVATE
    ${FASTBPTT_FLAGS_${isa}} ${FASTBPTT_KERNEL_FLAGS})
  target_link_libraries(${objects} PRIVATE fastbptt_options fastbptt_eigen)
  set_target_properties(${objects} PROPERTIES INTERPROCEDURAL_OPTIMIZATION OFF)
  target_sources(${target} INTERFACE $<TARGET_OBJECTS:${objects}>)
  target_compile_definitions(${target} INTERFACE FASTBPTT_HAS_${isa})
endfunction()

# target: an interface library that carries the objects of every ISA and their names; the sources
# are those of the kernels.
function(fastbptt_add_isa_targets target)
  add_library(${target} INTERFACE)
  foreach(isa IN LISTS FASTBPTT_ISAS)
    if(isa IN_LIST FASTBPTT_PART_PRODUCTS)
      fastbptt_add_isa_objects(${target} ${isa} cpp/src/tiles/${isa}.cpp)
    else()
      fastbptt_add_isa_objects(${target} ${isa} ${ARGN})
    endif()
  endforeach()
  if(FASTBPTT_EMULATE_AMX AND TARGET ${target}_amx)
    target_compile_definitions(${target}_amx PRIVATE FASTBPTT_EMULATE_AMX)
    target_compile_definitions(${target} INTERFACE FASTBPTT_EMULATE_AMX)
  endif()
endfunction()
