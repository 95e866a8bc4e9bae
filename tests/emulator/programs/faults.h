// Faults by name: FAULT("name") is its place in the program's list kFaults, checked when compiling.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <string_view>

#include "csrc/emulator/emulator.h"

template <size_t N>
constexpr int place_of(const char* const (&all)[N], std::string_view name) {
  for (size_t i = 0; i < N; i++)
    if (name == all[i]) return int(i);
  throw "no such fault";
}

#define FAULT(name) (std::integral_constant<int, place_of(kFaults, name)>::value)

// the place of the argument fault=…; with list=1 prints all and ends
template <size_t N>
int chosen_fault(const emu::Arguments& args, const char* const (&all)[N]) {
  if (args.get("list", 0)) {
    for (const char* f : all) std::printf("%s\n", f);
    std::exit(0);
  }
  const std::string name = args.text("fault", "none");
  for (size_t i = 0; i < N; i++)
    if (name == all[i]) return int(i);
  std::fprintf(stderr, "there is no fault %s\n", name.c_str());
  std::exit(2);
}
