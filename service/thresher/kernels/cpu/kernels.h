// What the vectorised kernels are given, in plain C++: the file with PyTorch's headers is compiled once, the kernels
// once for each instruction set.
#pragma once

#include <cstdint>

namespace thresher {

constexpr int64_t kBlockRows = 8;   // rows that share a start in compact storage
constexpr int64_t kMaxDim = 1024;   // columns of a table
constexpr int64_t kMaxPartitions = 16;

enum class Shared { kNone, kTable, kColumn, kRow, kElement };
enum class Combine { kAdd, kMult, kConcat };
enum class Rule { kSgd, kRowwiseAdagrad, kAdagrad, kAdam };
enum class Dtype { kFloat, kHalf, kBFloat16 };

// How the kernels see a row. A threshold shared by a whole table is one that every column shares.
enum class Kind { kPlain, kColumn, kRow, kElement, kMasked };

// Divides by a multiplication: a division of 64 bits costs as much as reading a row.
struct Divisor {
  int64_t value = 1;
  double inverse = 1.0;

  int64_t quotient(int64_t x) const {
    if (value == 1) return x;
    if (x >= INT64_C(1) << 52) return x / value;  // beyond what a double holds exactly
    int64_t q = static_cast<int64_t>(static_cast<double>(x) * inverse);  // off by one at most
    const int64_t rest = x - q * value;
    return q + (rest >= value) - (rest < 0);
  }
};

// One table. All pointers are to the table's own part, but `weights` and their states are to the whole flat tensors
// where storage is compact, since `starts` counts from there.
struct Table {
  int64_t rows, dim;
  void* weights;
  float* states[2];
  float* thresholds;
  float* threshold_states[2];
  bool* seen;
  const float* column_thresholds;  // g of each column, for kColumn
  const uint8_t* masks;
  const int64_t* starts;
  int partitions;  // 0 for a plain table
  Divisor divisors[kMaxPartitions], moduli[kMaxPartitions];
  int64_t first_rows[kMaxPartitions];

  // The stacked row that partition p gives for an id.
  int64_t row_of(int p, int64_t id) const {
    const int64_t quotient = divisors[p].quotient(id);
    const int64_t wrapped = quotient < moduli[p].value ? 0 : moduli[p].quotient(quotient) * moduli[p].value;
    return first_rows[p] + quotient - wrapped;
  }
};

// Ids of one feature, its bags [0, batch).
struct Bags {
  const int64_t* indices;
  const int64_t* offsets;        // of bag b: ids [offsets[b], offsets[b + 1])
  const float* sample_weights;   // of each id, or null
  bool mean;
  bool stream;                   // write vectors past the caches, where they lie on whole lines
};

struct Update {
  float learning_rate, weight_decay, threshold_learning_rate, threshold_weight_decay, eps;
  float correction1, correction2;  // Adam's 1 − beta^step
  float inverse_dim;               // 1 / columns of the table
};

// The rows that one task updates, in order, and where their gradients are. The payload of an id is its bag, counted over
// the table's features, or, where `bag_of` is there, its number among the table's ids.
struct Merged {
  const uint32_t* payloads;  // of row after row
  int64_t count;
  const int64_t* rows;      // the different rows
  const int64_t* firsts;    // first payload of each, and the end
  int64_t different;
  bool simple;              // one feature, summed without weights: the payload is the row of grad
  const uint32_t* bag_of;   // bag of each id, by payload
  const int64_t* id_of;     // place in `indices` of each id, by payload
  const float* grad;        // [batch, stride]
  int64_t stride, batch;
  const int64_t* columns;   // first column in grad of each of the table's features
  const Bags* bags;         // each of the table's features
  float* column_grads;      // [dim, padded to a vector], for kColumn: sums of ĝ sign(v)
  float* merged;            // composed tables: merged gradients [different, dim]
};

struct Kernels {
  // Pooled vectors of bags [first, last) to out + bag * stride.
  void (*lookup)(const Table&, Kind, Dtype, Combine, const Bags&, float pressure, int64_t first, int64_t last,
                 float* out, int64_t stride);
  // For each id of bags [first, last) the product of its vector with the bag's gradient.
  void (*sample_weight_grad)(const Table&, Kind, Dtype, Combine, const Bags&, float pressure, int64_t first,
                             int64_t last, const float* grad, int64_t stride, float* out);
  // Merge the gradients of equal rows and update the rows, their states and thresholds.
  void (*update)(const Table&, Kind, Dtype, Rule, const Merged&, const Update&, float pressure);
  // The same in two steps, for composed tables: a row's gradient depends on other rows as they were.
  void (*merge_composed)(const Table&, Kind, Dtype, Combine, const Merged&, float pressure);
  void (*update_merged)(const Table&, Kind, Dtype, Rule, const Merged&, const Update&, float pressure);
};

const Kernels& portable_kernels();
#if defined(__x86_64__)
const Kernels& avx2_kernels();
const Kernels& avx512_kernels();
#endif

}  // namespace thresher
