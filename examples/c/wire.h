/* The little that a producer needs below the protocol: RESP2 over a socket, msgpack, SHA-256, CRC-32, a draft's identity. */
#ifndef WIRE_H
#define WIRE_H
#include <stddef.h>
#include <stdint.h>

/* msgpack, written. `data` grows; set `n` to 0 to begin again, free `data` at the end. */
typedef struct { unsigned char *data; size_t n, room; } Pack;
void pack_map(Pack *p, int pairs);
void pack_array(Pack *p, int items);
void pack_str(Pack *p, const char *text);
void pack_bin(Pack *p, const void *data, size_t n);
void pack_int(Pack *p, long long value); /* not negative */
void pack_double(Pack *p, double value);
void pack_bool(Pack *p, int value);
void pack_nil(Pack *p);

/* msgpack, read. kind: 'i' integer, 'b' boolean, 'd' number, 's' text, 'x' bytes, 'a' array, 'm' map (n pairs), '0' nil. */
typedef struct Item { char kind; long long integer; double number; char *text; int n; struct Item *items; } Item;
Item *unpack(const char *data, size_t n); /* NULL unless it is exactly one value */
const Item *map_get(const Item *map, const char *name);
void item_free(Item *item);

/* Redis. A call gives NULL when the connection broke; its value lives until the next call, or until value_free if kept. */
typedef struct Value { char kind; char *text; long long n; struct Value **items; } Value; /* kind: + - : $ * and _ for null */
typedef struct { int fd; char buffer[65536]; size_t at, end; Value *last; } Redis;
int redis_connect(Redis *r, const char *address);
void redis_close(Redis *r);
Value *redis_call_n(Redis *r, int n, const char **args, const size_t *lengths);
Value *redis_call(Redis *r, int n, const char **args);
Value *value_keep(Redis *r, Value *value);
void value_free(Value *value);
#define ARGS(...) (const char *[]){__VA_ARGS__}

void put_le32(unsigned char *to, uint32_t value);
uint32_t crc32_of(const void *data, size_t n);
void sha256(unsigned char digest[32], int parts, const void *const *data, const size_t *n);

/* version: SHA-256 over config.json (after its length, 8 bytes little-endian) and model.safetensors. vocab: SHA-256 over the target's
 * vocabulary size (8 bytes little-endian) and the bytes of tensor d2t. Both as 64 hexadecimal digits. 0 when there is no draft. */
int draft_identity(const char *directory, char version[65], char vocab[65]);
#endif
