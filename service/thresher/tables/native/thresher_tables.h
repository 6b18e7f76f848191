/* Lookups in compact tables (docs/table_format.md) from memory that the caller has mapped.

   A table is opened once, which checks every byte that a lookup relies on, and may then be read by any number of threads.
   Lookups allocate nothing and read nothing outside of the memory that was checked; it must stay mapped and unchanged
   until the table is closed. */
#ifndef THRESHER_TABLES_H
#define THRESHER_TABLES_H

#include <stdint.h>

#define THRESHER_API __attribute__((visibility("default")))

#ifdef __cplusplus
extern "C" {
#endif

#define THRESHER_TABLES_ABI 1

enum { THRESHER_DENSE, THRESHER_BITMAP, THRESHER_BUCKETED };
enum { THRESHER_FP32, THRESHER_FP16, THRESHER_BF16, THRESHER_INT8, THRESHER_INT4 };
enum { THRESHER_PORTABLE, THRESHER_AVX2, THRESHER_AVX512, THRESHER_NEON };
enum { THRESHER_OK, THRESHER_BAD_ID, THRESHER_BAD_OFFSETS, THRESHER_BAD_ARGUMENT };

typedef struct thresher_table thresher_table;

/* A table in memory: the data of its tensors, which may begin at any address. */
typedef struct {
  int32_t layout;
  int32_t dtype;
  uint64_t rows;         /* 1 to 2^31 - 1 */
  uint64_t dim;          /* 1 to 1,024 */
  uint64_t kept;         /* parameters that stay, as the manifest says */
  const void* records;   /* `records`; dense: `values` */
  uint64_t record_bytes;
  const void* index;     /* bitmap: `present`; bucketed: `bucket_rows`; dense: none */
  uint64_t index_bytes;
  const void* scales;    /* int8 and int4: `scales` */
  uint64_t scale_bytes;
} thresher_parts;

/* The ids of one field for some samples, and where its vectors go. */
typedef struct {
  const thresher_table* table;
  const int64_t* ids;      /* rows of the table; -1 is none: it adds nothing, and does not count in a mean */
  uint64_t id_count;
  const int64_t* offsets;  /* [samples + 1], rising from 0 to id_count; null: one id a sample */
  const float* weights;    /* [id_count], which vectors are multiplied by; or null */
  float* out;              /* [samples, dim] */
  uint64_t out_stride;     /* floats from one sample's vector to the next */
  int32_t mean;            /* divide sums by the number of ids */
} thresher_bags;

/* Opens a table, or returns null and writes what is wrong with it as a text that ends with a 0. */
THRESHER_API thresher_table* thresher_table_open(const thresher_parts* parts, char* error, uint64_t error_bytes);

THRESHER_API void thresher_table_close(thresher_table* table);

/* Looks up all fields of some samples: float32 vectors, added up from a bag's first id to its last.
   After anything but THRESHER_OK the output is not to be used; bad_bags is the field, bad_position the place of the id. */
THRESHER_API int32_t thresher_lookup(const thresher_bags* bags, uint64_t count, uint64_t samples, uint64_t* bad_bags,
                                     uint64_t* bad_position);

/* The instructions in use: the best that the processor has. `thresher_use` takes others, for tests, and returns those
   that are in use then; it must not be called while lookups run. */
THRESHER_API int32_t thresher_instructions(void);
THRESHER_API int32_t thresher_use(int32_t instructions);

THRESHER_API int32_t thresher_tables_abi(void);

#ifdef __cplusplus
}
#endif
#endif
