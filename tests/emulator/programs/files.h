// Whole files in and out, for programs whose inputs and answers a Python test makes and checks.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

inline std::vector<unsigned char> read_file(const std::string& path) {
  FILE* f = std::fopen(path.c_str(), "rb");
  if (!f) std::fprintf(stderr, "cannot read %s\n", path.c_str()), std::exit(2);
  std::vector<unsigned char> all;
  for (int c; (c = std::fgetc(f)) != EOF;) all.push_back(static_cast<unsigned char>(c));
  std::fclose(f);
  return all;
}

inline void write_file(const std::string& path, const void* data, size_t bytes) {
  FILE* f = std::fopen(path.c_str(), "wb");
  if (!f || std::fwrite(data, 1, bytes, f) != bytes)
    std::fprintf(stderr, "cannot write %s\n", path.c_str()), std::exit(2);
  std::fclose(f);
}
